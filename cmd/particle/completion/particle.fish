# fish completion for particle: particle itself knows what may follow.

function __particle_complete
    set -l words (commandline -opc)
    set -l cur (commandline -ct)
    for line in ($words[1] docs complete $words[2..-1] "$cur" 2>/dev/null)
        switch $line
            case @files
                __fish_complete_path "$cur"
            case @dirs
                __fish_complete_directories "$cur"
            case '*'
                echo $line
        end
    end
end

complete -c particle -f -a '(__particle_complete)'

#compdef particle
# zsh completion for particle: particle itself knows what may follow.

_particle() {
	local line word
	local -a found open
	for line in ${(f)"$($words[1] docs complete "${(@Q)words[2,CURRENT]}" 2>/dev/null)"}; do
		word=${line%%$'\t'*}
		case $word in
			@files) _files ;;
			@dirs) _files -/ ;;
			*:|*=|*//) open+=($word) ;;
			*)
				if [[ $line == *$'\t'* ]]; then
					found+=("${word//:/\\:}:${line#*$'\t'}")
				else
					found+=("${word//:/\\:}")
				fi
				;;
		esac
	done
	(( $#open )) && compadd -S '' -- $open
	(( $#found )) && _describe particle found
}

if [[ $funcstack[1] == _particle ]]; then
	_particle "$@"
else
	compdef _particle particle
fi

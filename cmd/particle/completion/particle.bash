# bash completion for particle: particle itself knows what may follow.

_particle() {
	local line=${COMP_LINE:0:COMP_POINT} cur words word reply=() IFS=$' \t\n'
	cur=${line##*[[:space:]]}
	read -ra words <<<"${line%"$cur"}"
	# bash replaces only what stands behind the last of these.
	local keep=
	[[ $cur == *[:=]* ]] && keep=${cur%"${cur##*[:=]}"}

	COMPREPLY=()
	mapfile -t reply < <("${words[0]}" docs complete "${words[@]:1}" "$cur" 2>/dev/null)
	for word in "${reply[@]}"; do
		case $word in
		@files) compopt -o default ;;
		@dirs)
			compopt -o filenames
			mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -d -- "${cur#"$keep"}")
			;;
		*)
			word=${word%%$'\t'*}
			case $word in *:|*=|*//) compopt -o nospace ;; esac
			COMPREPLY+=("${word#"$keep"}")
			;;
		esac
	done
}
complete -F _particle particle

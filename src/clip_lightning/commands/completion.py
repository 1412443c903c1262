"""`clip-lightning completion`: a script that lets the shell complete commands and options."""

from __future__ import annotations

from clip_lightning.__main__ import COMMANDS
from clip_lightning.arguments import run_functions
from clip_lightning.commands.help import read_options

SCRIPT = """_clip_lightning() {{
    local words="{commands}"
    if [ "$COMP_CWORD" -gt 1 ]; then
        words=""
        case "${{COMP_WORDS[1]}}" in fit|validate|test|sweep|compare-backbones) words="{options}";; esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
[ -n "$ZSH_VERSION" ] && autoload -U +X bashcompinit && bashcompinit
complete -o default -F _clip_lightning clip-lightning"""


def run(args: list[str]) -> None:
    """Run `completion` with the arguments of the command line."""
    run_functions(completion, args)


def completion() -> None:
    """Print a completion script for bash or zsh; put `eval "$(clip-lightning completion)"` into ~/.bashrc."""
    options = " ".join(f"--{name}" for name in read_options() if not name.endswith(".*"))
    print(SCRIPT.format(commands=" ".join(COMMANDS), options=options))

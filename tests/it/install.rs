//! Man pages, completions and the script that installs them: what `--help` names is in all of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{Run, run};
use crate::home::{HANDOVER, Home};
use crate::rights::is_installed_or_skip;

const VERBS: [&str; 8] = ["upgrade", "restart", "status", "ps", "stop", "check", "exec", "scale"];

fn handover(arguments: &[&str]) -> Run {
    let mut command = Command::new(HANDOVER);
    command.args(arguments);
    run(command)
}

/// The long options that the help of a verb lists.
fn options(verb: &str) -> Vec<String> {
    let help = handover(&[verb, "--help"]).exits_with(0).stdout;
    let option = |line: &str| {
        let line = line.trim_start();
        let named = line.strip_prefix("-h, ").or_else(|| line.strip_prefix("-V, ")).unwrap_or(line);
        named.starts_with("--").then(|| named.split_whitespace().next().map(str::to_owned))?
    };
    help.lines().filter_map(option).filter(|option| option != "--").collect()
}

#[track_caller]
fn generated(what: &str) -> (Home, PathBuf) {
    let home = Home::new();
    let directory = home.path("made/for/it");
    handover(&["generate", what, directory.to_str().unwrap()]).exits_with(0);
    (home, directory)
}

#[test]
fn the_verbs_are_those_of_the_help() {
    let help = handover(&["--help"]).exits_with(0).stdout;
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let verbs: Vec<&str> = commands.map_while(|line| line.split_whitespace().next()).collect();
    assert_eq!(verbs, VERBS);
}

#[test]
fn the_help_is_short_and_the_long_one_has_examples() {
    for verb in VERBS {
        let [short, long] = ["-h", "--help"].map(|flag| handover(&[verb, flag]).exits_with(0).stdout);
        assert!(short.lines().count() < long.lines().count() && short.lines().count() < 40, "{short}");
        assert!(long.contains("\nExamples:\n  handover "), "{long}");
        assert!(!short.contains("Examples:"), "{short}");
        assert!(long.lines().all(|line| line.chars().count() <= 100), "{long}");
    }
    let top = handover(&["--help"]).exits_with(0).stdout;
    assert!(top.contains("Examples:") && top.contains("  8  nothing serves any more"), "{top}");
    assert!(!handover(&["-h"]).exits_with(0).stdout.contains("Examples:"));
}

#[test]
fn man_pages_name_every_option_of_the_help() {
    let (_home, directory) = generated("man");
    let page = |name: &str| fs::read_to_string(directory.join(name)).unwrap().replace('\\', "");
    let top = page("handover.1");
    for verb in VERBS {
        assert!(top.contains(&format!("handover-{verb}(1)")), "{verb} is not in {top}");
        let page = page(&format!("handover-{verb}.1"));
        let options = options(verb);
        assert!(options.len() >= 3, "{options:?}");
        for option in options {
            assert!(page.contains(&option), "{option} of {verb} is not in its page");
        }
        assert!(page.contains(".SH EXAMPLES"), "{page}");
    }
    assert!(!top.contains("generate"), "{top}");
    assert_eq!(fs::read_dir(&directory).unwrap().count(), VERBS.len() + 1);
}

#[test]
fn completions_name_every_option_of_the_help() {
    let (_home, directory) = generated("completions");
    for name in ["handover.bash", "_handover", "handover.fish"] {
        let text = fs::read_to_string(directory.join(name)).unwrap();
        for verb in VERBS {
            assert!(text.contains(verb), "{verb} is not in {name}");
            for option in options(verb) {
                // fish leaves the dashes out.
                let in_fish = format!("-l {}", option.trim_start_matches('-'));
                assert!(text.contains(&option) || text.contains(&in_fish), "{option} of {verb} is not in {name}");
            }
        }
        assert!(!text.contains("generate"), "{name} names what is hidden");
    }
}

#[test]
fn bash_completes() {
    let (_home, directory) = generated("completions");
    let script = "source \"$1\"; COMP_WORDS=(handover upgrade --p); COMP_CWORD=2; \
        _handover handover --p upgrade; echo \"${COMPREPLY[*]}\"";
    let mut command = Command::new("bash");
    command.args(["-c", script, "bash"]).arg(directory.join("handover.bash"));
    run(command).exits_with(0).says("--pid --pid-file --previous\n");
}

/// A real line is completed, in a terminal of its own; a key shows what it has become.
#[test]
fn zsh_completes() {
    if !is_installed_or_skip("zsh", "completions of zsh") {
        return;
    }
    let (home, directory) = generated("completions");
    let script = r#"
        zmodload zsh/zpty
        zpty shell zsh -f -i
        zpty -w shell "fpath=($1 \$fpath); autoload -Uz compinit; compinit -u -D"
        zpty -w shell 'show() { print -r -- "<$BUFFER>" }; zle -N show; bindkey "^T" show; PS1=rea""dy'
        # The prompt: before it the terminal still edits lines by itself.
        zpty -r shell said '*ready*'
        for line in "$@[2,-1]"; do
            zpty -w -n shell "$line"$'\t\C-T\C-U'
            zpty -r shell said '*<*>*'
            print -r -- "${${said##*<}%%>*}"
        done
        zpty -d shell"#;
    let mut command = Command::new("timeout");
    command.args(["30", "zsh", "-f", "-c", script, "zsh"]).arg(&directory).env("HOME", home.path(""));
    command.args(["handover upgrade --pid-", "handover upg", "handover upgrade --wait hea", "handover stop --drain"]);
    let lines = "handover upgrade --pid-file=\nhandover upgrade \nhandover upgrade --wait healthy \n\
        handover stop --drain-timeout=\n";
    assert_eq!(run(command).exits_with(0).stdout, lines);
}

#[test]
fn fish_completes() {
    if !is_installed_or_skip("fish", "completions of fish") {
        return;
    }
    let (home, directory) = generated("completions");
    let complete = |line: &str| {
        let mut command = Command::new("fish");
        let script = "source $argv[1]; complete --do-complete $argv[2]";
        command.args(["--no-config", "-c", script]).arg(directory.join("handover.fish")).arg(line);
        command.env("HOME", home.path(""));
        let candidates = run(command).exits_with(0).stdout;
        candidates.lines().map(|line| line.split('\t').next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(complete("handover upgrade --p"), ["--pid", "--pid-file", "--previous"]);
    assert_eq!(complete("handover upg"), ["upgrade"]);
    assert_eq!(complete("handover upgrade --wait "), ["drained", "healthy", "ready"]);
}

fn install(root: &Path, more: &[&str]) -> Run {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/install.sh");
    let mut command = Command::new(script);
    // What is tested is built already.
    command.args(["--root", root.to_str().unwrap(), "--prefix", "/usr"]).args(more).env("HANDOVER_BINARY", HANDOVER);
    run(command)
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return vec![] };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

#[test]
fn everything_is_installed_and_removed() {
    let home = Home::new();
    let root = home.path("root");
    install(&root, &[]).exits_with(0).says("usr/bin/handover");
    let mut installed = files_below(&root);
    installed.sort();
    let expected = [
        "bin/handover",
        "share/bash-completion/completions/handover",
        "share/fish/vendor_completions.d/handover.fish",
        "share/man/man1/handover-check.1",
        "share/man/man1/handover-exec.1",
        "share/man/man1/handover-ps.1",
        "share/man/man1/handover-restart.1",
        "share/man/man1/handover-scale.1",
        "share/man/man1/handover-status.1",
        "share/man/man1/handover-stop.1",
        "share/man/man1/handover-upgrade.1",
        "share/man/man1/handover.1",
        "share/zsh/site-functions/_handover",
    ];
    assert_eq!(installed, expected.map(|name| root.join("usr").join(name)));
    let mut command = Command::new(root.join("usr/bin/handover"));
    command.arg("--version");
    run(command).exits_with(0).says("handover ");
    // Again, over what is there.
    install(&root, &[]).exits_with(0);
    install(&root, &["--uninstall"]).exits_with(0);
    assert_eq!(files_below(&root), Vec::<PathBuf>::new());
}

#[test]
fn the_script_says_what_it_does_not_understand() {
    let home = Home::new();
    install(&home.path("root"), &["--help"]).exits_with(0).says("Usage: scripts/install.sh");
    install(&home.path("root"), &["--prefiks"]).exits_with(2).complains("unknown option `--prefiks` (see --help)");
    install(&home.path("root"), &["--prefix", "usr"]).exits_with(2).complains("wants an absolute path, not `usr`");
    assert_eq!(files_below(&home.path("root")), Vec::<PathBuf>::new());
}

#[test]
fn every_script_says_wrong_usage_as_the_command_does() {
    for name in ["bench", "demo", "install", "load", "soak", "test"] {
        let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("scripts/{name}.sh")));
        command.arg("--nonsense");
        run(command).exits_with(2).complains("`--nonsense`").complains("(see --help)");
    }
}

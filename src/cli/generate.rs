//! `handover generate`: man pages and completions, from the same definitions as the command line itself.
//!
//! It is for `scripts/install.sh` and for packagers, so no help and no completion names it: it is added to the
//! definitions only where they parse.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Command, CommandFactory, FromArgMatches, ValueEnum};
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;

use super::exit::{Exit, Failure};
use super::options_file;

const VERB: &str = "generate";
const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    what: What,
    /// Where to; it is made if it is missing
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// handover.1, and one page a verb
    Man,
    /// handover.bash, _handover for zsh, handover.fish
    Completions,
}

/// Reads the command line, where this verb is understood too.
pub(super) fn parse() -> Result<Result<super::Arguments, Arguments>, clap::Error> {
    let verb = Command::new(VERB).hide(true).about("Write the man pages or the shell completions");
    let command_line = options_file::expand(std::env::args_os().collect(), &definitions())?;
    let matches = definitions().subcommand(Arguments::augment_args(verb)).try_get_matches_from(command_line)?;
    Ok(match matches.subcommand_matches(VERB) {
        Some(matches) => Err(Arguments::from_arg_matches(matches)?),
        None => Ok(super::Arguments::from_arg_matches(&matches)?),
    })
}

pub(super) fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    let directory = &arguments.directory;
    let write = || -> io::Result<()> {
        fs::create_dir_all(directory)?;
        match arguments.what {
            What::Man => write_man_pages(directory),
            What::Completions => write_completions(directory),
        }
    };
    write().map_err(|error| Failure::new(Exit::Failed, format!("cannot write to {}: {error}", directory.display())))?;
    Ok(Exit::Done)
}

fn definitions() -> Command {
    super::Arguments::command()
}

fn write_man_pages(directory: &Path) -> io::Result<()> {
    let mut top = definitions();
    // Gives the verbs their whole names.
    top.build();
    let verbs: Vec<Command> = top.get_subcommands().cloned().collect();
    for command in verbs.into_iter().chain([top]) {
        let page = Man::new(command);
        let mut text = Vec::new();
        page.render(&mut text)?;
        let text = String::from_utf8_lossy(&text);
        // What follows `--help`: lines that are to stay as they are.
        let text =
            text.replace("\n.SH EXTRA\n", "\n.SH EXAMPLES\n.nf\n").replace("\n.SH VERSION\n", "\n.fi\n.SH VERSION\n");
        fs::write(directory.join(page.get_filename()), text)?;
    }
    Ok(())
}

fn write_completions(directory: &Path) -> io::Result<()> {
    for shell in SHELLS {
        generate_to(shell, &mut definitions(), "handover", directory)?;
    }
    Ok(())
}

//! The `handover` command: parse, do, exit.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let arguments = match cli::Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are asked for, and go to stdout with 0; anything else is wrong usage, with 2.
            let _ = error.print();
            return if error.use_stderr() { cli::Exit::Usage.into() } else { cli::Exit::Done.into() };
        }
    };
    cli::run(arguments).into()
}

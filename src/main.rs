//! The `handover` command: parse, do, exit.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod cli;
#[cfg(fuzzing)]
pub(crate) use cli::fuzz;

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(error) = handover::supervisor::run_worker(std::env::args_os()) {
        eprintln!("handover: {error}");
        return ExitCode::from(cli::NOT_EXECUTED);
    }
    if let Some(exit) = handover::supervisor::rehearse(std::env::args_os()) {
        return exit;
    }
    cli::log_to_stderr();
    match cli::run() {
        Ok(exit) => exit.into(),
        Err(error) => {
            // Help and version are asked for, and go to stdout with 0; anything else is wrong usage, with 2.
            let _ = error.print();
            if error.use_stderr() { cli::Exit::Usage.into() } else { cli::Exit::Done.into() }
        }
    }
}

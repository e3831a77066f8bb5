//! `handover scale`

use clap::Args;
use handover::control::Client;

use super::Which;
use super::exit::{Exit, Failure};
use super::output::Output;

/// Change how many processes of its program a supervisor runs
///
/// For what `handover exec` runs. Returns when as many serve, and the others have finished their connections. If a new one
/// does not come up, all is as it was.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:\n  \
    handover scale 4 --pid 4711\n  \
    handover scale 1 --name web")]
pub(crate) struct Arguments {
    /// So many
    #[arg(value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: u16,
    #[command(flatten)]
    which: Which,
    /// Print one JSON object a line
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) fn run(arguments: &Arguments, output: &mut Output) -> Result<Exit, Failure> {
    let client = Client::connect(&arguments.which.named_target()?)?;
    let result = client.scale(arguments.workers.into(), |answer| output.answer("scaling", answer))?;
    Ok(output.result(&result))
}

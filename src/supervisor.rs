//! `handover exec`: keeps one pid, holds the listeners, and replaces the program below it.
//!
//! For the `handover` command alone. In the order of a worker's life:
//!
//! | | |
//! |---|---|
//! | `options`, `listen` | what it is told |
//! | `machine` | **the state machine**: which worker is started, told to stop, killed, and when |
//! | `engine` | one loop that waits for whatever can happen, tells the machine, and does what that answers |
//! | `sockets` | the listeners, and the variables that tell a program of them |
//! | `build` | which program that is, now and after a crash |
//! | `worker`, `trampoline` | starting it |
//! | `interception`, `caller`, `kept` | the sockets that it binds by itself, for one that takes none |
//! | `conversation` | the protocol, with programs that use the library |
//! | `take_over` | a server that runs already, whose place it takes |
//! | `notify`, `node_channel`, `seen` | how it proves that it can serve |
//! | `output` | what it writes to stderr |
//! | `connections`, `family` | what it has open, seen from outside |

mod options;
mod listen;
mod machine;
mod engine;
mod sockets;
mod kept;
mod build;
mod worker;
mod trampoline;
mod interception;
mod caller;
mod take_over;
mod conversation;
mod notify;
mod node_channel;
mod seen;
mod output;
mod connections;
mod family;

pub use engine::{Ended, rehearse};
pub use listen::Listen;
pub use options::{Hangup, Intercept, Options, Ready, StopSignal};
pub use trampoline::run_worker;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz {
    pub(crate) use super::caller::fuzz as socket_addresses;
    pub(crate) use super::conversation::fuzz as conversation;
    pub(crate) use super::engine::fuzz as saved_state;
    pub(crate) use super::node_channel::fuzz as node_messages;
    pub(crate) use super::notify::fuzz as notifications;
    pub(crate) use super::seen::fuzz as seen;
}

use crate::error::Error;

/// Goes on in the place of a supervisor that has replaced itself by this build, if this process is one.
pub fn resume() -> Option<Result<Ended, Error>> {
    Some(engine::resumed()?.and_then(engine::Supervisor::run_on))
}

/// Whether the sockets that a program binds by itself can be kept here: what the kernel has, and what this process may do.
///
/// # Errors
///
/// What is missing, and what to do instead.
pub fn can_intercept() -> Result<(), Error> {
    interception::check()
}

/// Runs the program until it is told to stop.
///
/// # Errors
///
/// Why it could not be started: nothing runs then.
pub fn run(options: Options) -> Result<Ended, Error> {
    if let Some(user) = &options.user {
        trampoline::find_user(user)?;
    }
    let supervisor = engine::Supervisor::new(options)?;
    supervisor.run()
}

//! LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES: sockets from systemd or whoever speaks its convention (sd_listen_fds(3)).

use std::env;

use crate::listeners::Inherited;
use crate::protocol::FDS_MAX;
use crate::sys;
use crate::systemd::{self, name_in_store};

const FIRST_FD: i32 = 3;

fn is_for_this_process() -> bool {
    // Another process's variable, inherited by us, is none of our business.
    env::var("LISTEN_PID").is_ok_and(|pid| pid.parse() == Ok(std::process::id()))
}

/// As which generation `handover exec` runs this process, if it does: then it is not for us to start others.
pub(crate) fn supervised_generation() -> Option<u64> {
    env::var_os("HANDOVER_WORKER").filter(|_| is_for_this_process())?;
    env::var("HANDOVER_GENERATION").ok()?.parse().ok()
}

/// The sockets that a service manager has passed to this very process. What is no socket, or no kind of listener, is
/// passed over.
pub(crate) fn from_environment() -> Vec<Inherited> {
    if !is_for_this_process() {
        return vec![];
    }
    let text = |variable| env::var(variable).unwrap_or_default();
    let (count, names) = (text("LISTEN_FDS"), text("LISTEN_FDNAMES"));
    let (mut found, mut lost) = (Vec::new(), Vec::new());
    for (number, name) in named_fds(&count, &names) {
        let Some(fd) = sys::fd_from_environment(number) else {
            log::warn!("LISTEN_FDS={count}, but fd {number} is not open");
            continue;
        };
        let nonblocking = socket2::SockRef::from(&fd).set_nonblocking(true);
        let inherited = nonblocking.and_then(|()| match name_in_store(name) {
            Some(name) => Inherited::stored(name.to_owned(), fd),
            None => Inherited::activated(name.to_owned(), fd),
        });
        match inherited {
            Ok(Some(inherited)) if inherited.has_lost_its_path() => {
                log::warn!("no client finds `{name}` any more: {} is gone, so it is bound anew", inherited.address);
                lost.push(inherited.name);
            }
            Ok(Some(inherited)) => found.push(inherited),
            Ok(None) => log::warn!("`{name}` of LISTEN_FDS is not of a kind that handover serves: ignored"),
            Err(error) => log::warn!("`{name}` of LISTEN_FDS is ignored: {error}"),
        }
    }
    // The service manager is not to bring them again. Told together: it may not listen, and is waited for.
    systemd::forget_stored(&lost.iter().map(String::as_str).collect::<Vec<_>>());
    found
}

fn named_fds<'a>(count: &str, names: &'a str) -> impl Iterator<Item = (i32, &'a str)> {
    let count = count.parse().unwrap_or(0).min(FDS_MAX);
    let names = names.split(':').map(|name| if name.is_empty() { "unknown" } else { name });
    (FIRST_FD..).zip(names.chain(std::iter::repeat("unknown"))).take(count)
}

/// Count and names, in lines.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(text: &str) {
    let (count, names) = text.split_once('\n').unwrap_or((text, ""));
    let found: Vec<_> = named_fds(count, names).collect();
    assert_eq!(found.len(), count.parse().unwrap_or(0).min(FDS_MAX));
    assert!(found.iter().all(|(number, name)| *number >= FIRST_FD && !name.is_empty() && !name.contains(':')));
}

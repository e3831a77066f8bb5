//! LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES: sockets from systemd or whoever speaks its convention (sd_listen_fds(3)).

use std::env;

use crate::listeners::Inherited;
use crate::protocol::FDS_MAX;
use crate::sys;
use crate::systemd::name_in_store;

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
    let count = env::var("LISTEN_FDS").ok().and_then(|count| count.parse().ok()).unwrap_or(0).min(FDS_MAX);
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let mut found = Vec::new();
    for index in 0..count {
        let name = names.next().filter(|name| !name.is_empty()).unwrap_or("unknown").to_owned();
        let Some(fd) = i32::try_from(index).ok().and_then(|index| sys::fd_from_environment(FIRST_FD + index)) else {
            log::warn!("LISTEN_FDS={count}, but fd {} is not open", FIRST_FD as usize + index);
            continue;
        };
        let nonblocking = socket2::SockRef::from(&fd).set_nonblocking(true);
        let inherited = nonblocking.and_then(|()| match name_in_store(&name) {
            Some(name) => Inherited::stored(name.to_owned(), fd),
            None => Inherited::activated(name.clone(), fd),
        });
        match inherited {
            Ok(Some(inherited)) => found.push(inherited),
            Ok(None) => log::warn!("`{name}` of LISTEN_FDS is not of a kind that handover serves: ignored"),
            Err(error) => log::warn!("`{name}` of LISTEN_FDS is ignored: {error}"),
        }
    }
    found
}

//! What this process does with signals.

use std::mem::MaybeUninit;

use nix::sys::signal::{SigSet, Signal};

/// Those that it ignores.
pub(crate) fn ignored_signals() -> SigSet {
    Signal::iterator().filter(|signal| is_ignored(*signal)).collect()
}

fn is_ignored(signal: Signal) -> bool {
    action_of(signal as libc::c_int) == Some(libc::SIG_IGN)
}

/// Whether it does what it does in a program that says nothing.
pub(crate) fn is_default(signal: libc::c_int) -> bool {
    action_of(signal) == Some(libc::SIG_DFL)
}

fn action_of(signal: libc::c_int) -> Option<libc::sighandler_t> {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: with no new action given the call only writes the present one.
    let looked = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: the call has succeeded, so the value is written.
    (looked == 0).then(|| unsafe { action.assume_init() }.sa_sigaction)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rust_programs_ignore_sigpipe() {
        let ignored = ignored_signals();
        assert!(ignored.contains(Signal::SIGPIPE) && !ignored.contains(Signal::SIGSEGV));
    }
}

//! What this process does with signals.

use std::mem::MaybeUninit;

use nix::sys::signal::{SigSet, Signal};

/// Those that it ignores.
pub(crate) fn ignored_signals() -> SigSet {
    Signal::iterator().filter(|signal| is_ignored(*signal)).collect()
}

fn is_ignored(signal: Signal) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: with no new action given the call only writes the present one.
    let looked = unsafe { libc::sigaction(signal as libc::c_int, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: the call has succeeded, so the value is written.
    looked == 0 && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
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

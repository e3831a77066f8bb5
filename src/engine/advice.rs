//! What an operator can do about an upgrade that failed, as far as its end tells.

use crate::upgrade::Failure;

/// `exit` is how the new process ended, if it has; `silent`, whether it wrote nothing to stderr.
pub(crate) fn advice(failure: Failure, cause: &str, exit: Option<&str>, silent: bool) -> Option<&'static str> {
    match failure {
        // What it says has its mend in it.
        Failure::NotSpawned | Failure::Stopped | Failure::GaveUp => None,
        Failure::Silent if cause.contains("Handover::start") => {
            Some("does it use the library? Then let it call that first; --ready-timeout gives it longer")
        }
        Failure::Silent => Some("--ready-timeout gives it longer; so does `still_starting` in the program"),
        Failure::Refused if cause.contains("protocol versions") => {
            Some("upgrade by way of a build that speaks both versions")
        }
        Failure::Refused => None,
        Failure::NotAccepting if cause.contains("stands still") => {
            Some("who stopped it? A program in the background that uses its terminal is stopped, too")
        }
        Failure::NotAccepting => Some("its accept loop does not run: see its log"),
        Failure::ChannelBroken if cause.contains("closed the channel") => {
            Some("does it use the library, and leave fd 3 open?")
        }
        Failure::ChannelBroken if cause.contains("no frame") => {
            Some("does something in it write to fd 3? That is the channel to the old process")
        }
        Failure::ChannelBroken if cause.contains("nothing of restarts") => None,
        Failure::ChannelBroken => {
            Some("its library does not keep to docs/protocol.md: which one is it, and of what version?")
        }
        Failure::Exited => advice_for_exit(exit.unwrap_or_default(), silent),
    }
}

pub(crate) fn advice_for_exit(exit: &str, silent: bool) -> Option<&'static str> {
    if exit.contains("status 0") {
        return Some("let it stay in the foreground and call `ready()`; one that forks itself away cannot be upgraded");
    }
    if ["SIGUSR1", "SIGUSR2", "SIGHUP"].iter().any(|signal| exit.contains(signal)) {
        return Some("it had no handler for it yet: signal the serving process by its pid, not by name or group");
    }
    if exit.contains("SIGKILL") {
        return Some("out of memory? `dmesg` tells, and `handover check` compares what is free");
    }
    if ["SIGSEGV", "SIGBUS", "SIGILL"].iter().any(|signal| exit.contains(signal)) {
        return Some("is the file whole, and built for this machine? `handover check --exe` looks");
    }
    silent.then_some("it wrote nothing to stderr: see its own log")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_end_tells_is_told() {
        let of = |exit, silent| advice(Failure::Exited, "", Some(exit), silent).unwrap_or("");
        assert!(of("exited with status 0", true).contains("foreground"));
        assert!(of("was killed by SIGKILL", true).contains("dmesg"));
        let silent = advice(Failure::Silent, "has not even called `Handover::start`", None, true);
        assert!(silent.is_some_and(|advice| advice.contains("does it use the library?")));
        let broken = |cause| advice(Failure::ChannelBroken, cause, None, true).unwrap_or("");
        assert!(broken("sent bytes that are no frame (\"GET /\"…)").contains("write to fd 3"));
        assert!(broken("chose version 9 of the protocol, which was not offered").contains("docs/protocol.md"));
        assert!(of("was killed by SIGHUP", true).contains("by its pid"));
        assert!(of("was killed by SIGSEGV and dumped core", true).contains("handover check"));
        assert!(of("exited with status 1", true).contains("wrote nothing"));
        assert_eq!(of("exited with status 1", false), "", "its own words say it");
        assert_eq!(of("exited with status 101", false), "");
    }
}

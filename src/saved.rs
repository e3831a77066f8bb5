//! How what a supervisor knows is written down for its own next build, which runs in the same process: an fd as its number,
//! a moment as that of the clock that goes on.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::shared::monotonic_us;
use crate::sys;

/// Open in the process that reads it under the same number, by `execve` or by a file action.
pub(crate) mod fd {
    use super::*;

    pub(crate) fn serialize<F: AsFd, S: Serializer>(fd: &F, serializer: S) -> Result<S::Ok, S::Error> {
        fd.as_fd().as_raw_fd().serialize(serializer)
    }

    pub(crate) fn deserialize<'de, F: From<OwnedFd>, D: Deserializer<'de>>(deserializer: D) -> Result<F, D::Error> {
        take(i32::deserialize(deserializer)?)
    }

    fn take<F: From<OwnedFd>, E: Error>(number: i32) -> Result<F, E> {
        #[cfg(any(test, fuzzing))]
        let fd = match STAND_INS.get() {
            true => stand_in(number),
            false => sys::fd_from_environment(number),
        };
        #[cfg(not(any(test, fuzzing)))]
        let fd = sys::fd_from_environment(number);
        fd.map(F::from).ok_or_else(|| E::custom(format!("fd {number} is not open")))
    }

    pub(crate) mod option {
        use super::*;

        pub(crate) fn serialize<F: AsFd, S: Serializer>(fd: &Option<F>, serializer: S) -> Result<S::Ok, S::Error> {
            fd.as_ref().map(|fd| fd.as_fd().as_raw_fd()).serialize(serializer)
        }

        pub(crate) fn deserialize<'de, F, D>(deserializer: D) -> Result<Option<F>, D::Error>
        where
            F: From<OwnedFd>,
            D: Deserializer<'de>,
        {
            Option::<i32>::deserialize(deserializer)?.map(take).transpose()
        }
    }
}

#[cfg(any(test, fuzzing))]
thread_local! {
    static STAND_INS: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Whatever is read meanwhile takes no fd of this process, which are not its own, but others in their place.
#[cfg(any(test, fuzzing))]
pub(crate) fn with_stand_ins(f: impl FnOnce()) {
    STAND_INS.set(true);
    f();
    STAND_INS.set(false);
}

#[cfg(any(test, fuzzing))]
fn stand_in(number: i32) -> Option<OwnedFd> {
    (3..1000).contains(&number).then(|| std::fs::File::open("/dev/null").ok().map(OwnedFd::from))?
}

/// By CLOCK_MONOTONIC, in microseconds, as `Instant` counts.
pub(crate) mod moment {
    use super::*;

    fn to_us(moment: Instant) -> u64 {
        let now = Instant::now();
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        match moment.checked_duration_since(now) {
            Some(ahead) => monotonic_us().saturating_add(us(ahead)),
            None => monotonic_us().saturating_sub(us(now.duration_since(moment))),
        }
    }

    fn from_us(us: u64) -> Instant {
        let (now, now_us) = (Instant::now(), monotonic_us());
        let moment = match us.checked_sub(now_us) {
            Some(ahead) => now.checked_add(Duration::from_micros(ahead)),
            None => now.checked_sub(Duration::from_micros(now_us - us)),
        };
        moment.unwrap_or(now)
    }

    pub(crate) fn serialize<S: Serializer>(moment: &Instant, serializer: S) -> Result<S::Ok, S::Error> {
        to_us(*moment).serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Instant, D::Error> {
        u64::deserialize(deserializer).map(from_us)
    }

    pub(crate) mod option {
        use super::*;

        pub(crate) fn serialize<S: Serializer>(moment: &Option<Instant>, serializer: S) -> Result<S::Ok, S::Error> {
            moment.map(to_us).serialize(serializer)
        }

        pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Instant>, D::Error> {
            Ok(Option::<u64>::deserialize(deserializer)?.map(from_us))
        }
    }
}

/// A path, which may be no UTF-8.
pub(crate) mod path {
    use super::*;

    pub(crate) fn serialize<P: Clone + Into<OsString>, S: Serializer>(
        path: &P,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        path.clone().into().serialize(serializer)
    }

    pub(crate) fn deserialize<'de, P: From<OsString>, D: Deserializer<'de>>(deserializer: D) -> Result<P, D::Error> {
        OsString::deserialize(deserializer).map(P::from)
    }

    pub(crate) mod option {
        use super::*;

        pub(crate) fn serialize<P: Clone + Into<OsString>, S: Serializer>(
            path: &Option<P>,
            serializer: S,
        ) -> Result<S::Ok, S::Error> {
            path.clone().map(Into::into).serialize(serializer)
        }

        pub(crate) fn deserialize<'de, P: From<OsString>, D: Deserializer<'de>>(
            deserializer: D,
        ) -> Result<Option<P>, D::Error> {
            Ok(Option::<OsString>::deserialize(deserializer)?.map(P::from))
        }
    }
}

/// By its number.
pub(crate) mod pid {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(pid: &Pid, serializer: S) -> Result<S::Ok, S::Error> {
        pid.as_raw().serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Pid, D::Error> {
        i32::deserialize(deserializer).map(Pid::from_raw)
    }

    pub(crate) mod option {
        use super::*;

        pub(crate) fn serialize<S: Serializer>(pid: &Option<Pid>, serializer: S) -> Result<S::Ok, S::Error> {
            pid.map(Pid::as_raw).serialize(serializer)
        }

        pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Pid>, D::Error> {
            Ok(Option::<i32>::deserialize(deserializer)?.map(Pid::from_raw))
        }
    }
}

/// A set of signals by their numbers.
pub(crate) mod signals {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(signals: &SigSet, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(signals.iter().map(|signal| signal as i32))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SigSet, D::Error> {
        let numbers = Vec::<i32>::deserialize(deserializer)?;
        numbers.into_iter().map(|number| Signal::try_from(number).map_err(Error::custom)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;
    use std::path::PathBuf;

    #[derive(Serialize, Deserialize)]
    struct All {
        #[serde(with = "moment")]
        past: Instant,
        #[serde(with = "moment::option")]
        ahead: Option<Instant>,
        #[serde(with = "path")]
        path: PathBuf,
        #[serde(with = "path::option")]
        none: Option<PathBuf>,
        #[serde(with = "signals")]
        signals: SigSet,
        #[serde(with = "fd")]
        fd: OwnedFd,
    }

    #[test]
    fn what_is_written_is_read() {
        let now = Instant::now();
        let (reader, writer) = std::io::pipe().unwrap();
        let all = All {
            past: now - Duration::from_secs(1),
            ahead: Some(now + Duration::from_secs(60)),
            path: PathBuf::from(OsString::from_vec(b"/srv/\xff".to_vec())),
            none: None,
            signals: [Signal::SIGHUP, Signal::SIGUSR2].into_iter().collect(),
            fd: reader.into(),
        };
        let text = serde_json::to_string(&all).unwrap();
        // Its number is what is written; whoever reads it is to be the one who has it.
        let number = std::os::fd::IntoRawFd::into_raw_fd(all.fd);
        let read: All = serde_json::from_str(&text).unwrap();
        let close = |a: Instant, b: Instant| a.max(b).duration_since(a.min(b)) < Duration::from_millis(50);
        assert!(close(read.past, all.past) && close(read.ahead.unwrap(), all.ahead.unwrap()));
        assert_eq!((read.path, read.none, read.signals), (all.path, None, all.signals));
        assert_eq!(read.fd.as_raw_fd(), number);
        drop((read.fd, writer));
        let closed = text.replace(&format!("\"fd\":{number}"), "\"fd\":900000");
        let error = serde_json::from_str::<All>(&closed).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("fd 900000 is not open"), "{error}");
    }
}

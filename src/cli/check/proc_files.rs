//! What `/proc/PID` and `/proc/meminfo` say, read from their text.

/// The value of a line `Name:   value`.
pub(super) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
}

/// The value of a line `Name:  123 kB`, in bytes.
pub(super) fn bytes(text: &str, name: &str) -> Option<u64> {
    let kib: u64 = field(text, name)?.strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The effective id of a line like `Uid:  real effective saved fs`.
pub(super) fn effective_id(status: &str, name: &str) -> Option<u32> {
    field(status, name)?.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// The supplementary groups.
pub(super) fn groups(status: &str) -> Vec<u32> {
    let groups = field(status, "Groups").unwrap_or_default();
    groups.split_ascii_whitespace().filter_map(|group| group.parse().ok()).collect()
}

/// The soft limit of a line of `/proc/PID/limits`; `u64::MAX` for none.
pub(super) fn soft_limit(limits: &str, name: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    match line.split_ascii_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

/// Whether a signal is in a mask like `SigCgt:  0000000180014003`.
pub(super) fn has_signal(status: &str, mask: &str, signal: i32) -> bool {
    let mask = field(status, mask).and_then(|mask| u64::from_str_radix(mask, 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}

/// A variable of `/proc/PID/environ`: as it was when the process began.
pub(super) fn variable(environ: &[u8], name: &str) -> Option<Vec<u8>> {
    let mut variables = environ.split(|byte| *byte == 0);
    variables.find_map(|one| Some(one.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tserver\nUid:\t1000\t1001\t1000\t1000\nGroups:\t4 24 \nRssAnon:\t    2048 kB\n\
        SigCgt:\t0000000000000801\nThreads:\t3\n";

    #[test]
    fn the_status_of_a_process_is_read() {
        assert_eq!(field(STATUS, "Threads"), Some("3"));
        assert_eq!(field(STATUS, "Thread"), None);
        assert_eq!(bytes(STATUS, "RssAnon"), Some(2 << 20));
        assert_eq!(effective_id(STATUS, "Uid"), Some(1001));
        assert_eq!(groups(STATUS), [4, 24]);
        assert!(has_signal(STATUS, "SigCgt", 1) && has_signal(STATUS, "SigCgt", 12));
        assert!(!has_signal(STATUS, "SigCgt", 15) && !has_signal(STATUS, "SigIgn", 1));
    }

    #[test]
    fn limits_are_read() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units\n\
            Max open files            1024                 524288               files\n\
            Max pending signals       unlimited            unlimited            signals\n";
        assert_eq!(soft_limit(limits, "Max open files"), Some(1024));
        assert_eq!(soft_limit(limits, "Max pending signals"), Some(u64::MAX));
        assert_eq!(soft_limit(limits, "Max of something"), None);
    }

    #[test]
    fn variables_are_found_by_their_whole_name() {
        assert_eq!(variable(b"APATH=x\0PATH=/bin\0", "PATH"), Some(b"/bin".to_vec()));
        assert_eq!(variable(b"APATH=x\0", "PATH"), None);
    }
}

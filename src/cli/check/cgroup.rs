//! How much room a process's control group has left: version 2, version 1, or both mounted at once.

use std::fs;
use std::path::{Path, PathBuf};

/// The names of the files that say it, which differ between the versions.
struct Names {
    limit: &'static str,
    used: &'static str,
    /// In `memory.stat`: what the kernel gives back before it kills.
    reclaimable: &'static str,
}

const MEMORY_V2: Names = Names { limit: "memory.max", used: "memory.current", reclaimable: "inactive_file" };
const MEMORY_V1: Names =
    Names { limit: "memory.limit_in_bytes", used: "memory.usage_in_bytes", reclaimable: "total_inactive_file" };
const TASKS: Names = Names { limit: "pids.max", used: "pids.current", reclaimable: "" };

/// Where a limit is, and what it leaves.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) left: u64,
    pub(super) limit: u64,
    pub(super) group: PathBuf,
}

/// The tightest memory limit around a process, in bytes.
pub(super) fn memory(pid: i32) -> Option<Room> {
    let place = Place::of(pid, "memory")?;
    place.tightest(if place.version_2 { &MEMORY_V2 } else { &MEMORY_V1 })
}

/// The tightest limit on the number of tasks around a process.
pub(super) fn tasks(pid: i32) -> Option<Room> {
    Place::of(pid, "pids")?.tightest(&TASKS)
}

/// The directory of a group, and the top of its hierarchy.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    top: PathBuf,
    group: PathBuf,
    version_2: bool,
}

impl Place {
    fn of(pid: i32, controller: &str) -> Option<Self> {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        Self::find(&groups, &mounts, controller)
    }

    fn find(groups: &str, mounts: &str, controller: &str) -> Option<Self> {
        let of_version_1 = groups.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            controllers.split(',').any(|one| one == controller).then_some(path)
        });
        let of_version_2 = || groups.lines().find_map(|line| line.strip_prefix("0::"));
        let (path, version_2) = match of_version_1 {
            Some(path) => (path, false),
            None => (of_version_2()?, true),
        };
        let (root, top) = mounts.lines().find_map(|line| mount(line, controller, version_2))?;
        // Inside of a container the mount may show only a part of the hierarchy.
        let below =
            Path::new(path).strip_prefix(root).ok().filter(|below| below.is_relative()).unwrap_or(Path::new(""));
        let top = PathBuf::from(top);
        Some(Self { group: top.join(below), top, version_2 })
    }

    /// A limit holds for everything below it, so each group on the way up counts.
    fn tightest(&self, names: &Names) -> Option<Room> {
        let groups = self.group.ancestors().take_while(|group| group.starts_with(&self.top));
        groups.filter_map(|group| room(group, names)).min_by_key(|room| room.left)
    }
}

/// Root and place of a mount of that hierarchy, from a line of mountinfo.
fn mount<'a>(line: &'a str, controller: &str, version_2: bool) -> Option<(&'a str, &'a str)> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let (root, place) = (before.next()?, before.next()?);
    let mut after = after.split(' ');
    let (kind, options) = (after.next()?, after.nth(1)?);
    let wanted = match version_2 {
        true => kind == "cgroup2",
        false => kind == "cgroup" && options.split(',').any(|one| one == controller),
    };
    wanted.then_some((root, place))
}

fn room(group: &Path, names: &Names) -> Option<Room> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    // `max`, and version 1's number for "no limit", which is nearly the largest there is.
    let limit = read(names.limit)?.trim().parse().ok().filter(|limit| *limit < u64::MAX >> 2)?;
    let used: u64 = read(names.used)?.trim().parse().ok()?;
    let reclaimable = read("memory.stat").filter(|_| !names.reclaimable.is_empty());
    let reclaimable: u64 = reclaimable.and_then(|stat| counter(&stat, names.reclaimable)).unwrap_or(0);
    let left = u64::saturating_sub(limit, used.saturating_sub(reclaimable));
    Some(Room { left, limit, group: group.to_path_buf() })
}

fn counter(stat: &str, name: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// A table of groups and one of mounts, with an empty line between them. What is found is below the mount.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(text: &str) {
    let (groups, mounts) = text.split_once("\n\n").unwrap_or((text, text));
    for controller in ["memory", "pids"] {
        if let Some(place) = Place::find(groups, mounts, controller) {
            assert!(place.group.starts_with(&place.top), "{place:?}");
        }
    }
    let _ = counter(text, "inactive_file");
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "30 24 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755\n\
        31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
        34 30 0:30 /docker/1 /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory\n\
        35 30 0:31 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n";

    #[test]
    fn the_group_is_found_in_either_version() {
        let mixed = "8:pids:/app\n4:memory,other:/docker/1/app\n0::/app.slice\n";
        let found = Place::find(mixed, MOUNTS, "memory").unwrap();
        assert_eq!((found.group.to_str(), found.version_2), (Some("/sys/fs/cgroup/memory/app"), false));
        let found = Place::find("0::/app.slice/app.service\n", MOUNTS, "memory").unwrap();
        let group = "/sys/fs/cgroup/unified/app.slice/app.service";
        assert_eq!((found.group.to_str(), found.version_2), (Some(group), true));
        assert_eq!(Place::find("8:cpu:/\n", MOUNTS, "memory"), None);
        // No kernel writes such a line: its root is empty.
        let found = Place::find("0::/app\n", "31 30 0:27  /cgroup rw - cgroup2 cgroup2 rw\n", "memory").unwrap();
        assert_eq!(found.group, Path::new("/cgroup"));
    }

    #[test]
    fn the_tightest_limit_on_the_way_up_counts() {
        let top = std::env::temp_dir().join(format!("handover-cgroup-{}", std::process::id()));
        let group = top.join("slice/service");
        fs::create_dir_all(&group).unwrap();
        let write = |group: &Path, limit: &str, used: &str| {
            fs::write(group.join("memory.max"), limit).unwrap();
            fs::write(group.join("memory.current"), used).unwrap();
        };
        write(&group, "max\n", "700\n");
        write(&top.join("slice"), "1000\n", "900\n");
        fs::write(top.join("slice/memory.stat"), "anon 500\ninactive_file 150\n").unwrap();
        write(&top, "9000\n", "1000\n");
        let place = Place { top: top.clone(), group, version_2: true };
        let room = place.tightest(&MEMORY_V2);
        let none = place.tightest(&MEMORY_V1);
        fs::remove_dir_all(&top).unwrap();
        assert_eq!(room, Some(Room { left: 250, limit: 1000, group: top.join("slice") }));
        assert_eq!(none, None);
    }
}

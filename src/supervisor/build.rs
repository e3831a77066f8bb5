//! Which program a supervisor runs: as it was named, as it is started, and as it was when it was committed.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::SigSet;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::control::{BuildIdentity, UpgradeRequest};
use crate::error::Error;
use crate::shared::unix_ms;
use crate::supervisor::engine::STATE_VARIABLE;
use crate::upgrade::spawn::{Plan, Started};

/// Variables that speak of the supervisor's own start and would mislead its program.
const NOT_PASSED_ON: [&str; 10] = [
    STATE_VARIABLE,
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "FDSTORE",
    "NODE_CHANNEL_FD",
    "NODE_CHANNEL_SERIALIZATION_MODE",
    "SERVER_STARTER_PORT",
    "SERVER_STARTER_GENERATION",
    "EINHORN_FD_COUNT",
    "HANDOVER_GENERATION",
];

/// The program as it was named: by PATH, by a path with symbolic links, seen from a directory. An upgrade resolves all of
/// that again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Recipe {
    started: Started,
    #[serde(with = "changes")]
    config: Config,
}

/// A program that was resolved: what is started for one generation, and again when a worker of it has crashed.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Build {
    pub(super) plan: Plan,
    pub(super) identity: BuildIdentity,
    /// With what the upgrade to this build changed.
    pub(super) recipe: Recipe,
}

impl Recipe {
    pub(super) fn new(program: OsString, arguments: Vec<OsString>) -> Self {
        let config = NOT_PASSED_ON.iter().fold(Config::default(), |config, name| config.without_environment(*name));
        Self { started: Started::of_command(program, arguments), config }
    }

    /// Signals that were ignored when this process was started.
    pub(super) fn ignored(&self) -> &SigSet {
        &self.started.ignored
    }

    pub(super) fn program_path(&self) -> PathBuf {
        self.started.program_path(&self.config)
    }

    pub(super) fn directory(&self) -> PathBuf {
        self.started.directory(&self.config, None)
    }

    pub(super) fn build(&self, request: &UpgradeRequest, previous: Option<&BuildIdentity>) -> Result<Build, Error> {
        let plan = Plan::new(&self.started, &self.config, request, previous)?;
        let mut config = self.config.clone();
        for (name, value) in &request.env {
            config = config.environment(name, value);
        }
        config.directory = request.cwd.clone().or(config.directory);
        let recipe = Self { started: self.started.changed_by(request), config };
        Ok(Build { identity: identity_of(&plan.program), plan, recipe })
    }
}

impl Build {
    /// From now on this is what is started again after a crash, wherever a symbolic link in its path or that of its
    /// directory leads to by then.
    pub(super) fn pin(&mut self) {
        for path in [&mut self.plan.program, &mut self.plan.directory] {
            if let Ok(real) = fs::canonicalize(&*path) {
                *path = real;
            }
        }
    }

    /// The file is another one than was committed.
    pub(super) fn was_replaced(&self) -> bool {
        fs::metadata(&self.plan.program).map_or(true, |file| !self.identity.is(&file))
    }
}

/// Of a configuration what differs in a recipe.
mod changes {
    use super::*;
    use serde::{Deserializer, Serializer};

    type Changes = (Vec<(OsString, Option<OsString>)>, Option<OsString>);

    pub(super) fn serialize<S: Serializer>(config: &Config, serializer: S) -> Result<S::Ok, S::Error> {
        let directory = config.directory.clone().map(OsString::from);
        let changes: Changes = (config.environment.clone(), directory);
        changes.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Config, D::Error> {
        let (environment, directory) = Changes::deserialize(deserializer)?;
        Ok(Config { environment, directory: directory.map(PathBuf::from), ..Config::default() })
    }
}

fn identity_of(program: &Path) -> BuildIdentity {
    let mut identity = BuildIdentity {
        path: fs::canonicalize(program).unwrap_or_else(|_| program.to_path_buf()),
        ..BuildIdentity::default()
    };
    if let Ok(file) = fs::metadata(program) {
        identity.device = file.dev();
        identity.inode = file.ino();
        identity.size = file.len();
        identity.modified_unix_ms = file.modified().map(unix_ms).unwrap_or_default();
    }
    identity
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upgrade_s_changes_stay_and_a_committed_build_is_what_it_was() {
        let directory = std::env::temp_dir().join(format!("handover-build-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let link = directory.join("current");
        std::os::unix::fs::symlink("/bin/true", &link).unwrap();
        let recipe = Recipe::new("/bin/false".into(), vec!["a".into()]);
        let request = UpgradeRequest {
            exe: Some(link.clone()),
            env: [("A".to_owned(), "1".to_owned())].into(),
            ..UpgradeRequest::default()
        };
        let mut build = recipe.build(&request, None).unwrap();
        assert_eq!(build.plan.argv, [link.as_os_str(), "a".as_ref()]);
        build.pin();
        assert_eq!(build.plan.program, fs::canonicalize("/bin/true").unwrap());
        assert!(!build.was_replaced());
        // The next upgrade follows the link again.
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("/bin/sh", &link).unwrap();
        let next = build.recipe.build(&UpgradeRequest::default(), None).unwrap();
        assert_eq!(next.identity.path, fs::canonicalize("/bin/sh").unwrap());
        assert_eq!(next.recipe.program_path(), link);
        fs::remove_dir_all(&directory).unwrap();
    }
}

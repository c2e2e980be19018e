//! The operating-system account that servers run under.
//!
//! Postgres refuses to run as root. So when we are root, servers run as `postgres` (or `nobody`) and own their data;
//! when we are not, they run as ourselves. Invariant: a server never runs with more rights than an unprivileged user.
//! Non-goal: separating the servers of one run from each other.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// Who servers run as. Obtained from [`Account::detect`] alone.
#[derive(Clone, Debug)]
pub struct Account {
    uid: u32,
    /// Set when we are root and must become someone else.
    switch: Option<Switch>,
}

#[derive(Clone, Debug)]
struct Switch {
    name: &'static str,
    gid: u32,
}

impl Account {
    /// Ourselves, or an unprivileged user if we are root.
    pub fn detect() -> Result<Self> {
        let ourselves = rustix::process::geteuid();
        if !ourselves.is_root() {
            return Ok(Self { uid: ourselves.as_raw(), switch: None });
        }
        for name in ["postgres", "nobody"] {
            if let (Some(uid), Some(gid)) = (id("-u", name), id("-g", name))
                && uid != 0
            {
                return Ok(Self { uid, switch: Some(Switch { name, gid }) });
            }
        }
        bail!("PostgreSQL does not run as root, and there is neither a user postgres nor a user nobody to run it as")
    }

    /// The numeric user id of the servers.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// The user servers run as, if that is not ourselves.
    pub fn name(&self) -> Option<&'static str> {
        self.switch.as_ref().map(|switch| switch.name)
    }

    /// Makes `command` run under this account. The standard library drops root's supplementary groups along with it.
    pub fn apply(&self, command: &mut Command) {
        if let Some(switch) = &self.switch {
            command.uid(self.uid).gid(switch.gid).env_remove("HOME");
        }
    }

    /// Hands one file or directory over to this account.
    pub fn own(&self, path: &Path) -> Result<()> {
        if let Some(switch) = &self.switch {
            chown(path, Some(self.uid), Some(switch.gid))
                .with_context(|| format!("cannot hand {} over to user {}", path.display(), switch.name))?;
        }
        Ok(())
    }

    /// Makes a directory that this account owns and nobody else can enter.
    pub fn create_dir(&self, path: &Path) -> Result<()> {
        std::fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))?;
        self.own(path)
    }

    /// Fails, naming the directory at fault, if this account cannot get into `path` from the root.
    pub fn check_reachable(&self, path: &Path) -> Result<()> {
        let Some(switch) = &self.switch else { return Ok(()) };
        for dir in path.ancestors().filter(|dir| dir.exists()) {
            let meta = std::fs::metadata(dir)?;
            let bit = if meta.uid() == self.uid {
                0o100
            } else if meta.gid() == switch.gid {
                0o010
            } else {
                0o001
            };
            if meta.mode() & bit == 0 {
                bail!(
                    "user {} cannot enter {}, and PostgreSQL must run as that user because we are root. \
                       Choose a directory below one that all users can enter, or run as an ordinary user",
                    switch.name,
                    dir.display()
                );
            }
        }
        Ok(())
    }
}

/// `id -u postgres` → 101; none if there is no such user.
fn id(flag: &str, user: &str) -> Option<u32> {
    let said = Command::new("id").args([flag, user]).output().ok().filter(|said| said.status.success())?;
    String::from_utf8(said.stdout).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_never_run_as_root() {
        let account = Account::detect().expect("an unprivileged account");
        let mut command = Command::new("id");
        command.arg("-u").current_dir("/");
        account.apply(&mut command);
        let said = String::from_utf8(command.output().expect("id runs").stdout).expect("digits");
        assert_eq!(said.trim(), account.uid().to_string());
        assert_ne!(account.uid(), 0);
    }

    #[test]
    fn supplementary_groups_are_dropped() {
        let account = Account::detect().expect("an unprivileged account");
        if account.name().is_none() {
            return; // Not root: groups are our own and stay.
        }
        let mut command = Command::new("id");
        command.arg("-G").current_dir("/");
        account.apply(&mut command);
        let said = String::from_utf8(command.output().expect("id runs").stdout).expect("digits");
        assert!(!said.split_whitespace().any(|group| group == "0"), "still in root's group: {said}");
    }

    #[test]
    fn a_closed_parent_directory_is_named() {
        let account = Account::detect().expect("an unprivileged account");
        let closed = tempfile::tempdir().expect("a directory");
        std::fs::set_permissions(closed.path(), std::fs::Permissions::from_mode(0o700)).expect("chmod");
        let checked = account.check_reachable(&closed.path().join("inside"));
        match account.name() {
            Some(_) => assert!(checked.expect_err("closed").to_string().contains(&closed.path().display().to_string())),
            None => checked.expect("our own directory"),
        }
    }
}

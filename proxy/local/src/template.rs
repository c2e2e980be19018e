//! initdb once, copy ever after: a start costs a directory copy instead of a bootstrap.
//!
//! The cache is one private directory per user under the system's temporary directory; in it one template per Postgres
//! version and cluster name, made under a file lock and renamed into place whole. By name, because a copy inherits the
//! system identifier: so the servers of one tier have different ones, as real servers do. Beside a template is the
//! random password of its superuser, which a cluster keeps only until its own is set.
//! Must not enter a template: anything else that differs between clusters.

use std::fs::{File, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::cluster::SUPERUSER;
use crate::{Account, Binaries, Run, password};

/// Raised whenever what [`make`] puts into a template changes.
const LAYOUT: u32 = 2;

/// Copies the template of clusters called `name` to `data` (which must not exist); gives its superuser's password. Blocks.
pub(crate) fn instantiate(run: &Run, name: &str, data: &Path) -> Result<String> {
    let template = find_or_make(run.binaries(), run.account(), name)?;
    let mut copy = command(run.account(), Path::new("cp"));
    copy.args(if cfg!(target_os = "linux") { &["-a", "--reflink=auto"][..] } else { &["-Rp"][..] });
    copy.arg(template.join("data")).arg(data);
    output(copy)?;
    let password = std::fs::read_to_string(template.join("password")).context("the template's password")?;
    Ok(password.trim().to_owned())
}

fn find_or_make(binaries: &Binaries, account: &Account, name: &str) -> Result<PathBuf> {
    let cache = cache_dir()?;
    account.check_reachable(&cache)?;
    let version = binaries.postgres_version.replace('.', "_"); // A dot would begin an extension, replaced below.
    let template = cache.join(format!("initdb-{}-{version}-{name}-v{LAYOUT}", account.uid()));
    let lock = File::options().create(true).truncate(false).write(true).open(template.with_extension("lock"))?;
    lock.lock()?;
    if !template.exists() {
        let building = template.with_extension("building");
        if building.exists() {
            std::fs::remove_dir_all(&building)?; // Whoever made it was killed: we hold the lock.
        }
        make(binaries, account, &building)?;
        std::fs::rename(&building, &template)?;
    }
    Ok(template)
}

/// A directory that only we can write to, so that nobody can plant a template.
fn cache_dir() -> Result<PathBuf> {
    let ourselves = rustix::process::geteuid().as_raw();
    let dir = std::env::temp_dir().canonicalize()?.join(format!("weir-cache-{ourselves}"));
    match std::fs::create_dir(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("cannot create {}", dir.display()));
        }
        _ => {}
    }
    let meta = std::fs::symlink_metadata(&dir)?;
    if !meta.is_dir() || meta.uid() != ourselves {
        bail!("{} is not a directory of ours: remove it", dir.display());
    }
    std::fs::set_permissions(&dir, Permissions::from_mode(0o711))?;
    Ok(dir)
}

fn make(binaries: &Binaries, account: &Account, building: &Path) -> Result<()> {
    account.create_dir(building)?;
    let secret = building.join("password");
    std::fs::write(&secret, format!("{}\n", password()))?;
    std::fs::set_permissions(&secret, Permissions::from_mode(0o600))?;
    account.own(&secret)?;
    // C.UTF-8 sorts by bytes as C does, but knows letters; systems without it get C.
    let with_locale = |locale: &str| {
        let mut initdb = command(account, &binaries.postgres("initdb"));
        initdb.arg("--pgdata").arg(building.join("data")).arg("--pwfile").arg(&secret);
        initdb.args(["--username", SUPERUSER, "--auth=scram-sha-256", "--encoding=UTF8", "--no-sync"]);
        initdb.arg(format!("--locale={locale}"));
        output(initdb)
    };
    with_locale("C.UTF-8").or_else(|_| with_locale("C"))?;
    let conf = building.join("data/postgresql.conf");
    let text = std::fs::read_to_string(&conf)?;
    std::fs::write(&conf, format!("{text}\ninclude 'weir-local.conf'\n"))?;
    Ok(())
}

/// A program run as the servers' account, in a directory it can enter.
pub(crate) fn command(account: &Account, program: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir("/").env("LC_ALL", "C");
    account.apply(&mut command);
    command
}

/// Runs a short-lived program to its end; its words are the error if it fails.
pub(crate) fn output(mut command: Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let said = command.output().with_context(|| format!("cannot run {program}"))?;
    if !said.status.success() {
        bail!(
            "{program} failed ({}):\n{}{}",
            said.status,
            String::from_utf8_lossy(&said.stdout),
            String::from_utf8_lossy(&said.stderr)
        );
    }
    Ok(())
}

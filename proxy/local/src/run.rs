//! A run: one directory, the processes started in it, and the promise that neither is left behind.
//!
//! Three things keep the promise. Dropping the last handle stops and removes everything. A *reaper* (a shell that waits
//! on a pipe from us) does the same the moment we die without dropping, even by SIGKILL. And a new run sweeps away
//! sibling runs whose owner is dead, should their reaper have been killed too.
//!
//! The owner is alive exactly as long as it holds a lock on `owner.pid`; a recorded process is the one meant only if
//! its start mark matches, so a reused process id is never signalled.
//!
//! Layout: `owner.pid` · `reaper.pid` · `kept` · `pids/<pid>` (pid, start mark, stop signal, label) · `log/<label>.log` ·
//! one directory per server.

use std::fs::{File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail};

use crate::process::{kill_family, start_mark};
use crate::{Account, Binaries, Process, StopSignal};

/// A directory without an owner is only swept when it is older than this: it may be about to get one.
const UNOWNED_AGE: Duration = Duration::from_secs(60);
/// How long a dead owner's reaper may take before we stop waiting for it.
const REAPER_WAIT: Duration = Duration::from_secs(10);

/// Marks a directory whose data its owner wants to have again.
const KEPT_FILE: &str = "kept";

/// What becomes of the directory at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leftovers {
    /// It is removed.
    Remove,
    /// It stays, stopped, for [`Run::at`] to take up again. Once kept it is kept for good: a person removes it.
    Keep,
}

/// One directory and what runs in it.
#[derive(Debug)]
pub struct Run {
    path: PathBuf,
    leftovers: Leftovers,
    account: Account,
    binaries: Binaries,
    /// Holding this lock says that we live.
    _owner: File,
    reaper: Reaper,
}

#[derive(Debug)]
struct Reaper {
    child: Child,
    /// Its end of file is our death. Closed on exec, so no other child of ours holds it open.
    pipe: ChildStdin,
}

impl Run {
    /// A new directory under the system's temporary directory, removed at the end. `kind` is part of its name.
    ///
    /// Sweeps stale runs of the same kind first.
    pub fn temporary(kind: &str) -> Result<Arc<Self>> {
        let parent = temp_dir()?;
        let prefix = format!("weir-{kind}-{}-", rustix::process::geteuid().as_raw());
        sweep(&parent, &prefix);
        let dir = tempfile::Builder::new()
            .prefix(&prefix)
            .permissions(Permissions::from_mode(0o711))
            .tempdir_in(&parent)
            .with_context(|| format!("cannot create a directory in {}", parent.display()))?;
        Self::own(dir.keep(), Leftovers::Remove)
    }

    /// The one place under the system's temporary directory where this user's runs of `kind` are kept, for [`Self::at`].
    pub fn usual_place(kind: &str) -> Result<PathBuf> {
        Ok(temp_dir()?.join(format!("weir-{kind}-state-{}", rustix::process::geteuid().as_raw())))
    }

    /// A directory of the caller's choice; what an earlier run kept there can be taken up again.
    ///
    /// Fails if another run is using it, or if it holds anything that no run has made (it may be removed at the end).
    pub fn at(path: &Path, leftovers: Leftovers) -> Result<Arc<Self>> {
        let path = std::path::absolute(path)?;
        Account::detect()?.check_reachable(&path)?;
        std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let path = path.canonicalize()?;
        let marked = path.join("owner.pid").exists();
        if !marked && std::fs::read_dir(&path)?.next().is_some() {
            bail!("{} is not empty and was not made by weir: choose another directory", path.display());
        }
        if std::fs::metadata(&path)?.uid() != rustix::process::geteuid().as_raw() {
            bail!("{} belongs to another user: choose another directory", path.display());
        }
        if marked && !take_over(&path) {
            let owner = std::fs::read_to_string(path.join("owner.pid")).unwrap_or_default();
            bail!("{} is in use by process {}", path.display(), owner.trim());
        }
        std::fs::set_permissions(&path, Permissions::from_mode(0o711))?;
        if leftovers == Leftovers::Keep {
            std::fs::write(path.join(KEPT_FILE), "")?;
        }
        let leftovers = if Self::is_kept(&path) { Leftovers::Keep } else { Leftovers::Remove };
        Self::own(path, leftovers)
    }

    /// Whether an earlier run has left its data at `path` on purpose.
    pub fn is_kept(path: &Path) -> bool {
        path.join(KEPT_FILE).exists()
    }

    fn own(path: PathBuf, leftovers: Leftovers) -> Result<Arc<Self>> {
        let binaries = Binaries::find()?;
        let account = Account::detect()?;
        account.check_reachable(&path)?;
        for dir in ["pids", "log"].map(|dir| path.join(dir)) {
            std::fs::create_dir_all(&dir)?;
            std::fs::set_permissions(&dir, Permissions::from_mode(0o700))?;
        }
        // Locked under another name first: whoever sees owner.pid unlocked may rely on its owner being dead.
        let fresh = path.join(format!("owner.pid.{}", std::process::id()));
        let mut owner = File::options().write(true).create(true).truncate(true).open(&fresh)?;
        owner.lock()?;
        writeln!(owner, "{}", std::process::id())?;
        std::fs::rename(&fresh, path.join("owner.pid"))?;
        let reaper = Reaper::start(&path, leftovers)?;
        Ok(Arc::new(Self { path, leftovers, account, binaries, _owner: owner, reaper }))
    }

    /// The directory. Servers' own directories are below it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What becomes of the directory at the end.
    pub fn leftovers(&self) -> Leftovers {
        self.leftovers
    }

    /// Who servers of this run run as.
    pub fn account(&self) -> &Account {
        &self.account
    }

    /// The programs of this machine.
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// Where the process called `label` writes its log.
    pub fn log_path(&self, label: &str) -> PathBuf {
        self.path.join("log").join(format!("{label}.log"))
    }

    /// Starts a child with its output in `log/<label>.log`.
    pub fn spawn(self: &Arc<Self>, label: &str, stop: StopSignal, command: Command) -> Result<Process> {
        Ok(Process::spawn(self, label, stop, command, false)?.0)
    }

    /// As [`Self::spawn`], but the caller reads its standard output.
    pub fn spawn_piped(
        self: &Arc<Self>,
        label: &str,
        stop: StopSignal,
        command: Command,
    ) -> Result<(Process, ChildStdout)> {
        let (process, stdout) = Process::spawn(self, label, stop, command, true)?;
        Ok((process, stdout.context("standard output was piped")?))
    }

    /// Notes a child for the reaper and the sweep; gives the note's path, to be removed when the child is gone.
    pub(crate) fn record(&self, pid: u32, stop: StopSignal, label: &str) -> Result<PathBuf> {
        let path = self.path.join("pids").join(pid.to_string());
        let mark = start_mark(pid).unwrap_or_else(|| "gone".to_owned());
        std::fs::write(&path, format!("{pid} {mark} {} {label}\n", stop.name()))?;
        Ok(path)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Every Process holds the Run, so all of them have been stopped by now.
        clear(&self.path, self.leftovers);
        let _ = self.reaper.pipe.write_all(b"done\n");
        let _ = self.reaper.child.wait();
    }
}

impl Reaper {
    fn start(run: &Path, leftovers: Leftovers) -> Result<Self> {
        let what = match leftovers {
            Leftovers::Remove => "remove",
            Leftovers::Keep => "keep",
        };
        let mut child = Command::new("sh")
            .args(["-c", REAPER, "weir-reaper"])
            .arg(run)
            .arg(what)
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start sh")?;
        let mark = start_mark(child.id()).unwrap_or_default();
        std::fs::write(run.join("reaper.pid"), format!("{} {mark}\n", child.id()))?;
        let pipe = child.stdin.take().context("the reaper's pipe")?;
        Ok(Self { child, pipe })
    }
}

/// Arguments: the run's directory, and `remove` or `keep`. POSIX sh; `ps` is only used where there is no /proc.
const REAPER: &str = r#"
trap '' INT TERM HUP QUIT
run=$1
read -r word
[ "$word" = done ] && exit 0
mark() {
    if [ -e /proc/self/stat ]; then
        fields=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) || return
        set -- $fields
        case $1 in Z|X|'') return ;; esac
        shift 19
        echo "$1"
    else
        ps -o lstart= -p "$1" | sed 's/^ *//; s/ *$//; s/  */_/g'
    fi
}
each() {
    found=no
    for record in "$run"/pids/*; do
        read -r pid mark signal label <"$record" || continue
        [ "$(mark "$pid")" = "$mark" ] || continue
        found=yes
        kill -s "${1:-$signal}" -- "-$pid"
        kill -s CONT -- "-$pid"
    done
}
each
tries=0
while [ $found = yes ] && [ $tries -lt 50 ]; do
    sleep 0.1
    tries=$((tries + 1))
    found=no
    for record in "$run"/pids/*; do
        read -r pid mark signal label <"$record" && [ "$(mark "$pid")" = "$mark" ] && found=yes
    done
done
each KILL
if [ "$2" = remove ]; then
    rm -rf -- "$run" || { sleep 1; rm -rf -- "$run"; }
else
    rm -f -- "$run"/pids/*
fi
"#;

/// The temporary directory, without symbolic links (servers print and compare paths).
fn temp_dir() -> Result<PathBuf> {
    let dir = std::env::temp_dir();
    dir.canonicalize().with_context(|| format!("the temporary directory {} is not there", dir.display()))
}

/// Removes the runs below `parent` whose owner is dead.
fn sweep(parent: &Path, prefix: &str) {
    let ourselves = rustix::process::geteuid().as_raw();
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let path = entry.path();
        let ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix))
            && entry.metadata().is_ok_and(|meta| meta.is_dir() && meta.uid() == ourselves);
        if !ours {
            continue;
        }
        let stale = if path.join("owner.pid").exists() { take_over(&path) } else { unowned_for_long(&path) };
        if stale {
            clear(&path, Leftovers::Remove);
        }
    }
}

fn unowned_for_long(path: &Path) -> bool {
    let changed = std::fs::metadata(path).and_then(|meta| meta.modified());
    changed.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > UNOWNED_AGE))
}

/// True if the owner of the run at `path` is dead; then its reaper is done or dead, and none of its processes runs.
fn take_over(path: &Path) -> bool {
    // A directory that vanishes under us is being removed by its reaper.
    let Ok(owner) = File::open(path.join("owner.pid")) else { return !path.exists() };
    if owner.try_lock().is_err() {
        return false;
    }
    let deadline = Instant::now() + REAPER_WAIT;
    while read_record(&path.join("reaper.pid")).is_some() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    for entry in std::fs::read_dir(path.join("pids")).into_iter().flatten().flatten() {
        if let Some(pid) = read_record(&entry.path()) {
            kill_family(pid);
        }
    }
    true
}

/// The process a record names, if that very process still runs.
fn read_record(path: &Path) -> Option<u32> {
    let record = std::fs::read_to_string(path).ok()?;
    let mut words = record.split_whitespace();
    let pid: u32 = words.next()?.parse().ok()?;
    let mark = words.next()?;
    (start_mark(pid).as_deref() == Some(mark)).then_some(pid)
}

/// What is left once no process runs: shared memory of killed postmasters, records, the directory.
fn clear(path: &Path, leftovers: Leftovers) {
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        release_shared_memory(&entry.path().join("data/postmaster.pid"));
    }
    match leftovers {
        Leftovers::Remove => {
            let _ = std::fs::remove_dir_all(path);
        }
        Leftovers::Keep => {
            let _ = std::fs::remove_dir_all(path.join("pids"));
        }
    }
}

/// A postmaster that was killed leaves a System V segment of a few bytes; line 7 of its pid file names it (key, id).
fn release_shared_memory(pid_file: &Path) {
    let Ok(text) = std::fs::read_to_string(pid_file) else { return };
    if let Some(id) = text.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)) {
        let _ = Command::new("ipcrm").args(["-m", id]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

//! The state on disk: a file of batches, one JSON object per line, each with what changed since the one before.
//!
//! A batch is written before the answer that shows it leaves, so a process that is killed at any moment has lost
//! nothing that a client has seen. A last line that was cut off counts as never written. At each start, and when the
//! file has grown far beyond what it holds, it is written anew and put in place by a rename. `Journal::read` is the
//! way in. The files of volumes are themselves; `Sim::settle` makes both agree.

use super::Sim;
use super::state::{State, Vm, Volume, VolumeKey};
use super::tasks::Task;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// What the file is called in the state directory.
const NAME: &str = "state.jsonl";
/// Form of the file; another one is not read.
const FORM: u32 = 1;
/// Bytes that may be added before the file is written anew, on top of its size after the last time.
const SLACK: u64 = 16 << 20;

/// Why saved state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The file cannot be read or written.
    #[error("cannot use `{0}`")]
    Io(PathBuf, #[source] std::io::Error),
    /// A line of it is not of the right form.
    #[error("line {1} of `{0}` is damaged: {2} (hint: start with --fresh, which begins in the world again)")]
    Damaged(PathBuf, usize, String),
    /// It was written by another version.
    #[error("`{0}` has the form {1}, which this version does not read (hint: start with --fresh)")]
    Form(PathBuf, u32),
    /// It began in another world.
    #[error(
        "`{0}` goes on from another world than the one given (hint: give the world it began in, or start with --fresh)"
    )]
    World(PathBuf),
}

/// The first line.
#[derive(Serialize, Deserialize)]
struct Header {
    form: u32,
    /// The world it began in, in short.
    world: String,
}

/// A line: what changed. `None` stands for what is gone.
#[derive(Default, Serialize, Deserialize)]
struct Batch {
    /// Time since the cluster's start.
    elapsed_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rest: Option<Value>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    volumes: Vec<(VolumeKey, Option<Volume>)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    vms: Vec<(u32, Option<Vm>)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tasks: Vec<(u64, Option<Task>)>,
}

/// What an earlier run has left.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) state: State,
    /// How long the cluster had run.
    pub(super) elapsed: Duration,
}

#[derive(Debug)]
struct Writer {
    file: File,
    /// Bytes in the file, and how many it had when it was written anew.
    size: u64,
    fresh: u64,
    /// All but volumes, VMs and tasks, as last written.
    rest: String,
}

/// The file that is being written.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    world: String,
    writer: Mutex<Writer>,
}

impl Journal {
    /// What is in the directory; `None` where no run has been.
    pub(super) fn read(directory: &Path, world: &str) -> Result<Option<Saved>, SaveError> {
        let path = directory.join(NAME);
        let io = |error| SaveError::Io(path.clone(), error);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(error)),
        };
        let mut reader = BufReader::new(file);
        let damaged = |line: usize, error: &dyn std::fmt::Display| {
            SaveError::Damaged(path.clone(), line, error.to_string())
        };
        let mut text = String::new();
        let mut state = State::default();
        let mut elapsed_ms = 0;
        for number in 1.. {
            text.clear();
            // The end, or a line that was cut off with its writer.
            if reader.read_line(&mut text).map_err(io)? == 0 || !text.ends_with('\n') {
                break;
            }
            if number == 1 {
                let header: Header = serde_json::from_str(&text).map_err(|error| damaged(1, &error))?;
                if header.form != FORM {
                    return Err(SaveError::Form(path.clone(), header.form));
                }
                if header.world != world {
                    return Err(SaveError::World(path.clone()));
                }
                continue;
            }
            let batch: Batch = serde_json::from_str(&text).map_err(|error| damaged(number, &error))?;
            elapsed_ms = batch.elapsed_ms;
            apply(&mut state, batch).map_err(|error| damaged(number, &error))?;
        }
        Ok(Some(Saved { state, elapsed: Duration::from_millis(elapsed_ms) }))
    }

    /// Writes the whole state under a new file, and goes on there.
    pub(super) fn begin(
        directory: &Path,
        world: &str,
        state: &mut State,
        elapsed: Duration,
    ) -> Result<Self, SaveError> {
        let path = directory.join(NAME);
        let writer =
            write_anew(&path, world, state, elapsed).map_err(|error| SaveError::Io(path.clone(), error))?;
        Ok(Self { path, world: world.to_owned(), writer: Mutex::new(writer) })
    }

    /// Appends what has changed. The state is only looked at while the file is this call's, so that batches stand in
    /// the file in the order in which things happened.
    fn append(&self, sim: &Sim) -> std::io::Result<()> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let elapsed = sim.clock().elapsed();
        let line = sim.change(|state| batch(state, &mut writer.rest, elapsed));
        let Some(line) = line? else { return Ok(()) };
        let written = writer.file.write_all(line.as_bytes());
        writer.size += u64::try_from(line.len()).unwrap_or(u64::MAX);
        if written.is_err() || writer.size > 2 * writer.fresh + SLACK {
            // What could not be appended, or too much of it: all of it once more.
            *writer = sim.change(|state| write_anew(&self.path, &self.world, state, elapsed))?;
        }
        Ok(())
    }
}

fn apply(state: &mut State, batch: Batch) -> Result<(), serde_json::Error> {
    if let Some(rest) = batch.rest {
        let mut fresh: State = serde_json::from_value(rest)?;
        fresh.volumes = std::mem::take(&mut state.volumes);
        fresh.vms = std::mem::take(&mut state.vms);
        fresh.tasks = std::mem::take(&mut state.tasks);
        *state = fresh;
    }
    for (key, volume) in batch.volumes {
        match volume {
            Some(volume) => drop(state.volumes.insert(key, volume)),
            None => drop(state.volumes.remove(&key)),
        }
    }
    for (vmid, vm) in batch.vms {
        match vm {
            Some(vm) => drop(state.vms.insert(vmid, vm)),
            None => drop(state.vms.remove(&vmid)),
        }
    }
    for (number, task) in batch.tasks {
        match task {
            Some(task) => state.tasks.put(number, task),
            None => state.tasks.drop_number(number),
        }
    }
    Ok(())
}

/// What changed as a line, `None` where nothing did.
fn batch(state: &mut State, rest: &mut String, elapsed: Duration) -> std::io::Result<Option<String>> {
    let now = serde_json::to_string(&*state)?;
    let changed = now != *rest;
    if !changed && !state.is_dirty() {
        return Ok(None);
    }
    let owned = |value: Option<&Volume>| value.cloned();
    let batch = Batch {
        elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
        rest: if changed { Some(serde_json::from_str(&now)?) } else { None },
        volumes: state.volumes.take_dirty().into_iter().map(|(key, value)| (key, owned(value))).collect(),
        vms: state.vms.take_dirty().into_iter().map(|(key, value)| (key, value.cloned())).collect(),
        tasks: state
            .tasks
            .tracked()
            .take_dirty()
            .into_iter()
            .map(|(key, value)| (key, value.cloned()))
            .collect(),
    };
    *rest = now;
    Ok(Some(format!("{}\n", serde_json::to_string(&batch)?)))
}

fn write_anew(path: &Path, world: &str, state: &mut State, elapsed: Duration) -> std::io::Result<Writer> {
    state.track();
    let mut rest = String::new();
    let header = serde_json::to_string(&Header { form: FORM, world: world.to_owned() })?;
    let line = batch(state, &mut rest, elapsed)?.unwrap_or_default();
    let text = format!("{header}\n{line}");
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, &text)?;
    std::fs::rename(&fresh, path)?;
    let file = File::options().append(true).open(path)?;
    let size = u64::try_from(text.len()).unwrap_or(u64::MAX);
    Ok(Writer { file, size, fresh: size, rest })
}

impl State {
    /// Begins to remember changes; everything counts as changed.
    fn track(&mut self) {
        self.volumes.track();
        self.vms.track();
        self.tasks.tracked().track();
    }

    /// Whether a volume, VM or task has changed since the last batch.
    fn is_dirty(&mut self) -> bool {
        self.volumes.is_dirty() || self.vms.is_dirty() || self.tasks.tracked().is_dirty()
    }
}

impl Sim {
    /// Forgets what earlier runs have left in a state directory; its volumes go when the next run starts.
    pub fn forget(directory: &Path) -> Result<(), SaveError> {
        let path = directory.join(NAME);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(SaveError::Io(path, error)),
            _ => Ok(()),
        }
    }

    /// Writes what has changed to the state directory, where state is kept. Once it returns, the process may be killed.
    pub async fn save(&self) {
        let Some(journal) = self.inner.journal.get().cloned() else { return };
        let sim = self.clone();
        let written = tokio::task::spawn_blocking(move || journal.append(&sim)).await;
        if let Ok(Err(error)) = written {
            tracing::error!(%error, "cannot save the state; it is tried again with the next change");
        }
    }

    /// The same, where only volumes, VMs and tasks can have changed.
    pub(crate) async fn save_if_dirty(&self) {
        if self.inner.journal.get().is_some() && self.change(State::is_dirty) {
            self.save().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        let mut state = State::default();
        let volume =
            |size| Volume { size, ctime: 1, format: "raw", image: None, snapshots: Vec::new(), parent: None };
        let key = |name: &str| VolumeKey { storage: "s".to_owned(), node: None, name: name.to_owned() };
        state.volumes.insert(key("a"), volume(1));
        state.volumes.insert(key("b"), volume(2));
        state.cluster = "sim".to_owned();
        state
    }

    #[test]
    fn a_line_that_was_cut_off_counts_as_never_written() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut state = state();
        Journal::begin(directory.path(), "w", &mut state, Duration::from_secs(5)).expect("it is written");
        let path = directory.path().join(NAME);
        let mut file = File::options().append(true).open(&path).expect("it is there");
        file.write_all(br#"{"elapsed_ms":9,"volumes":[[{"sto"#).expect("it is written");
        let saved = Journal::read(directory.path(), "w").expect("it is read").expect("there is one");
        assert_eq!(saved.elapsed, Duration::from_secs(5));
        assert_eq!(saved.state.cluster, "sim");
        assert_eq!(saved.state.volumes.len(), 2);
    }

    #[test]
    fn damage_another_world_and_another_form_are_refused() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join(NAME);
        assert!(Journal::read(directory.path(), "w").expect("nothing is there").is_none());
        Journal::begin(directory.path(), "w", &mut state(), Duration::ZERO).expect("it is written");
        assert!(matches!(Journal::read(directory.path(), "v"), Err(SaveError::World(_))));
        let text = std::fs::read_to_string(&path).expect("it is there");
        std::fs::write(&path, text.replace("\"volumes\"", "\"volume!\"") + "garbage\n").expect("writable");
        assert!(matches!(Journal::read(directory.path(), "w"), Err(SaveError::Damaged(_, 3, _))));
        std::fs::write(&path, "{\"form\":99,\"world\":\"w\"}\n").expect("writable");
        assert!(matches!(Journal::read(directory.path(), "w"), Err(SaveError::Form(_, 99))));
    }

    #[test]
    fn only_what_changed_is_written_and_what_is_gone_stays_gone() {
        let mut state = state();
        state.track();
        let mut rest = String::new();
        let all =
            batch(&mut state, &mut rest, Duration::ZERO).expect("plain data").expect("everything is new");
        assert!(batch(&mut state, &mut rest, Duration::ZERO).expect("plain data").is_none());
        let gone = state.volumes.keys().next().cloned().expect("there are two");
        state.volumes.remove(&gone);
        let more = batch(&mut state, &mut rest, Duration::ZERO).expect("plain data").expect("one is gone");
        assert!(!more.contains("\"b\"") && !more.contains("rest"), "{more}");
        let mut again = State::default();
        for line in [all, more] {
            apply(&mut again, serde_json::from_str(&line).expect("what was written")).expect("it fits");
        }
        assert_eq!(again.volumes.len(), 1);
    }
}

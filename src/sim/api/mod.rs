//! Carries calls out: the order of checks is PVE's, waiting and files are here, decisions are in `rules`.

mod access;
mod cluster;
mod config;
mod hotplug;
pub(crate) mod power;
mod resize;
mod snapshot;
mod status;
mod storage;
mod storecfg;
mod task;
mod update;
mod vm;
pub(crate) mod volume;

use crate::sim::http::{Act, Call, Reply};
use crate::sim::rules::error::PveError;
use std::time::Duration;

/// Makes the call.
pub(crate) async fn perform(act: Act, call: Call) -> Result<Reply, PveError> {
    match act {
        Act::Version => Ok(cluster::version()),
        Act::Resources => Ok(cluster::resources(&call)),
        Act::NextId => cluster::next_id(&call),
        Act::ClusterStatus => cluster::status(&call),
        Act::Nodes => Ok(cluster::nodes(&call)),
        Act::Permissions => access::permissions(&call),
        Act::Ticket => access::ticket(&call).await,
        Act::StorageConfigs => Ok(storecfg::list(&call)),
        Act::StorageConfig => storecfg::get(&call),
        Act::StorageCreate => storecfg::create(&call),
        Act::StorageUpdate => storecfg::update(&call),
        Act::StorageDelete => storecfg::delete(&call),
        Act::StorageList => storage::list(&call).await,
        Act::StorageStatus => storage::status(&call),
        Act::ContentList => storage::content(&call).await,
        Act::Alloc => storage::alloc(&call).await,
        Act::VolumeGet => storage::get(&call),
        Act::VolumeDelete => storage::delete(&call).await,
        Act::VmList => Ok(status::list(&call)),
        Act::VmCreate => vm::create(&call),
        Act::VmDestroy => vm::destroy(&call),
        Act::ConfigGet => config::get(&call),
        Act::Pending => config::pending(&call),
        Act::ConfigPut => update::put(call).await,
        Act::ConfigPost => update::post(call).await,
        Act::Unlink => update::unlink(call).await,
        Act::Resize => Ok(resize::resize(call)),
        Act::StatusCurrent => status::current(&call).await,
        Act::Start => power::start(&call),
        Act::Stop => power::stop(&call),
        Act::SnapshotList => snapshot::list(&call),
        Act::SnapshotCreate => snapshot::create(call),
        Act::SnapshotDelete => snapshot::delete(call),
        Act::SnapshotConfig => snapshot::config(&call),
        Act::TaskList => Ok(task::list(&call)),
        Act::TaskStatus => task::status(&call),
        Act::TaskLog => task::log(&call),
    }
}

/// Waits for a task as `delay` and `background_delay` ask: `None` when it still runs.
async fn wait(call: &Call, upid: &str, seconds: u64) -> Option<String> {
    call.sim.wait_task(upid, Duration::from_secs(seconds)).await
}

/// Runs what blocks the thread; a panic in it becomes an error of the call.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, PveError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| PveError::die(format!("simulator: {error}")))
}

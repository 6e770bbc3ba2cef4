//! Carries calls out: the order of checks is PVE's, waiting and files are here, decisions are in `rules`.

mod access;
mod agent;
mod clone;
mod cloudinit;
mod cluster;
mod config;
mod copy;
mod disks;
mod download;
mod files;
mod guest;
mod ha;
mod hacommand;
mod hotplug;
mod jobs;
mod migrate;
mod movedisk;
mod node;
mod pools;
pub(crate) mod power;
mod resize;
mod snapshot;
mod status;
mod storage;
mod storecfg;
mod suspend;
mod task;
mod update;
mod users;
mod vm;
pub(crate) mod volume;

use crate::sim::http::{Act, Call, Reply};
use crate::sim::rules::error::PveError;
pub(crate) use ha::Sections;
use std::time::Duration;

/// Makes the call.
pub(crate) async fn perform(act: Act, call: Call) -> Result<Reply, PveError> {
    match act {
        Act::Version => Ok(cluster::version(&call)),
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
        Act::ContentList => content(&call).await,
        Act::Alloc => storage::alloc(&call).await,
        Act::VolumeGet => match files::named(&call) {
            Some(name) => files::get(&call, &name),
            None => storage::get(&call),
        },
        Act::VolumeDelete => match files::named(&call) {
            Some(name) => files::delete(&call, &name),
            None => storage::delete(&call).await,
        },
        Act::VmList => Ok(status::list(&call)),
        Act::VmCreate => vm::create(&call),
        Act::VmDestroy => vm::destroy(&call),
        Act::ConfigGet => config::get(&call),
        Act::Pending => config::pending(&call),
        Act::ConfigPut => update::put(call).await,
        Act::ConfigPost => update::post(call).await,
        Act::CloudInit => cloudinit::get(&call),
        Act::CloudInitDump => cloudinit::dump(&call),
        Act::CloudInitPut => cloudinit::put(&call).await,
        Act::Unlink => update::unlink(call).await,
        Act::Resize => Ok(resize::resize(call)),
        Act::StatusCurrent => status::current(&call).await,
        Act::Start => power::start(&call),
        Act::Stop => power::stop(&call),
        Act::SnapshotList => snapshot::list(&call),
        Act::SnapshotCreate => snapshot::create(call),
        Act::SnapshotDelete => Ok(snapshot::delete(call)),
        Act::SnapshotConfig => snapshot::config(&call),
        Act::ClusterOptions => Ok(cluster::options()),
        Act::ClusterTasks => Ok(task::recent(&call)),
        Act::Acl => Ok(access::acl(&call)),
        Act::AclUpdate => access::change_acl(&call),
        Act::Roles => Ok(access::roles(&call)),
        Act::RoleCreate => access::add_role(&call),
        Act::RoleUpdate => access::change_role(&call),
        Act::RoleDelete => access::remove_role(&call),
        Act::Role => access::role(&call),
        Act::AccessIndex => Ok(access::index()),
        Act::Domains => Ok(access::domains()),
        Act::Password => users::password(&call),
        Act::Users => Ok(users::list(&call)),
        Act::User => users::get(&call),
        Act::UserCreate => users::create(&call),
        Act::UserUpdate => users::update(&call),
        Act::UserDelete => users::delete(&call),
        Act::Groups => Ok(users::groups(&call)),
        Act::Group => users::group(&call),
        Act::GroupCreate => users::add_group(&call),
        Act::GroupUpdate => users::change_group(&call),
        Act::GroupDelete => users::remove_group(&call),
        Act::Tokens => users::tokens(&call),
        Act::Token => users::token(&call),
        Act::TokenCreate => users::add_token(&call),
        Act::TokenUpdate => users::update_token(&call),
        Act::TokenDelete => users::remove_token(&call),
        Act::HaResources => Ok(ha::resources(&call)),
        Act::HaResource => ha::resource(&call),
        Act::HaAdd => ha::add(&call),
        Act::HaRemove => ha::remove(&call),
        Act::HaRules => Ok(ha::rules(&call)),
        Act::HaRuleAdd => ha::add_rule(&call),
        Act::HaRuleRemove => Ok(ha::remove_rule(&call)),
        Act::HaStatus => Ok(ha::status(&call)),
        Act::HaGroups => ha::groups(&call),
        Act::HaGroupAdd => ha::add_group(&call),
        Act::HaGroup => ha::group(&call),
        Act::HaGroupChange => ha::change_group(&call),
        Act::HaGroupRemove => ha::remove_group(&call),
        Act::HaUpdate => ha::update(&call),
        Act::HaMigrate => ha::motion(&call, "migrate"),
        Act::HaRelocate => ha::motion(&call, "relocate"),
        Act::HaRule => ha::rule(&call),
        Act::HaRuleChange => ha::change_rule(&call),
        Act::Pools => Ok(pools::pools(&call)),
        Act::Pool => pools::pool(&call),
        Act::PoolCreate => pools::add_pool(&call),
        Act::PoolUpdate => pools::change_pool(&call),
        Act::PoolRemove => pools::remove_pool(&call),
        Act::Backups => Ok(jobs::backups(&call)),
        Act::Backup => jobs::backup(&call),
        Act::BackupAdd => Ok(jobs::add_backup(&call)),
        Act::BackupChange => jobs::change_backup(&call),
        Act::BackupRemove => jobs::remove_backup(&call),
        Act::BackupVolumes => jobs::included_volumes(&call),
        Act::Replications => Ok(jobs::replications(&call)),
        Act::Replication => jobs::replication(&call),
        Act::ReplicationAdd => jobs::add_replication(&call),
        Act::ReplicationChange => jobs::change_replication(&call),
        Act::ReplicationRemove => jobs::remove_replication(&call),
        Act::NodeReplications => Ok(jobs::node_replications(&call)),
        Act::NodeIndex => Ok(node::index()),
        Act::NodeStatus => Ok(node::status(&call)),
        Act::NodeCommand => Ok(node::command(&call)),
        Act::NodeTime => Ok(node::time(&call)),
        Act::Containers => Ok(node::containers()),
        Act::ClusterIndex => Ok(node::cluster_index()),
        Act::VmIndex => node::vm_index(&call),
        Act::Download => download::download(&call),
        Act::UrlMetadata => download::metadata(&call),
        Act::Upload => files::upload(&call),
        Act::Reboot => power::reboot(&call, false),
        Act::Reset => power::reboot(&call, true),
        Act::StorageIndex => Ok(storage::index()),
        Act::StorageIdentity => Err(storage::identity()),
        Act::VolumeAttributes => storage::attributes(&call),
        Act::VolumeCopy => storage::copy(&call),
        Act::Suspend => suspend::suspend(&call),
        Act::Resume => suspend::resume(&call),
        Act::Shutdown => power::shutdown(&call),
        Act::StatusIndex => status::index(&call),
        Act::Agent(command) => agent::command(&call, command).await,
        Act::Monitor => agent::monitor(&call),
        Act::MigrateGet => migrate::precondition(&call),
        Act::Migrate => migrate::migrate(call),
        Act::MoveDisk => movedisk::move_disk(call),
        Act::Clone => clone::clone(call),
        Act::Template => clone::template(call),
        Act::Feature => clone::feature(&call),
        Act::Rollback => Ok(snapshot::rollback(call)),
        Act::TaskStop => task::stop(&call),
        Act::TaskList => Ok(task::list(&call)),
        Act::TaskStatus => task::status(&call),
        Act::TaskLog => task::log(&call),
    }
}

/// Disk images and other files of a storage in one listing, in PVE's order (`Storage.pm:volume_list`).
async fn content(call: &Call) -> Result<Reply, PveError> {
    let mut reply = storage::content(call).await?;
    if let Some(entries) = reply.data.as_array_mut() {
        entries.extend(files::list(call));
    }
    Ok(reply)
}

/// Waits for a task as `delay` and `background_delay` ask: `None` when it still runs.
async fn wait(call: &Call, upid: &str, seconds: u64) -> Option<String> {
    call.sim.wait_task(upid, Duration::from_secs(seconds)).await
}

/// Runs what blocks the thread; a panic in it becomes an error of the call.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, PveError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| PveError::die(format!("simulator: {error}")))
}

/// Refuses to write a VM's config without quorum, in pmxcfs's words.
fn check_writable(sim: &crate::sim::Sim, node: &str, vmid: u32) -> Result<(), PveError> {
    if sim.read(|state| state.is_quorate(node)) {
        return Ok(());
    }
    Err(PveError::die(format!(
        "unable to open file '/etc/pve/nodes/{node}/qemu-server/{vmid}.conf.tmp.4711' - Permission denied"
    )))
}

/// Seconds a lock over the cluster is tried without quorum.
const CFS_PATIENCE: Duration = Duration::from_secs(10);

/// The lock of a storage, taken `by` a node; one over the cluster needs quorum (pve-cluster `Cluster.pm:$cfs_lock`).
async fn storage_lock(
    sim: &crate::sim::Sim,
    by: &str,
    node: Option<&str>,
    id: &str,
    log: Option<&crate::sim::tasks::TaskLog>,
) -> Result<crate::sim::locks::Held, PveError> {
    if node.is_none() && !sim.read(|state| state.is_quorate(by)) {
        tokio::time::sleep(CFS_PATIENCE).await;
        return Err(PveError::die(format!("cfs-lock 'storage-{id}' error: no quorum!")));
    }
    sim.locks().storage_in(node, id, log).await
}

/// Refuses parameters that are for `root@pam` with a ticket; even its tokens may not (`API2/Qemu.pm:vm_start`).
fn root_only(call: &Call, names: &[&str]) -> Result<(), PveError> {
    let is_set = |name: &&&str| call.get(name).is_some_and(|value| !matches!(value, "" | "0"));
    match names.iter().find(is_set).filter(|_| call.user != "root@pam") {
        Some(name) => Err(PveError::parameter(*name, "Only root may use this option.")),
        None => Ok(()),
    }
}

/// Refuses what a cluster without quorum does not begin (pve-cluster `Cluster.pm:check_cfs_quorum`).
fn check_quorum(call: &Call) -> Result<(), PveError> {
    if call.sim.read(|state| state.is_quorate(call.node())) {
        return Ok(());
    }
    Err(PveError::die("cluster not ready - no quorum?"))
}

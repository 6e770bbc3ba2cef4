//! The running state of the cluster, plain data behind one short-held lock.

use super::derived::{Holders, Sums};
use super::faults::Pending;
pub use super::records::LogEntry;
use super::records::{GuestSystem, StorageFile, TokenNote, User};
use super::rules::access::Access;
use super::rules::conf::Conf;
use super::rules::drive::Drive;
use super::rules::error::PveError;
use super::rules::plugin;
use super::tasktable::Tasks;
use super::tracked::Tracked;
use super::world;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;

/// Where a volume is: local volumes of two nodes may have the same id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VolumeKey {
    /// Storage id.
    pub storage: String,
    /// Node, or `None` on a shared storage.
    pub node: Option<String>,
    /// `9999/vm-9999-x.raw`
    pub name: String,
}

impl VolumeKey {
    /// The id the API uses.
    pub fn volid(&self) -> String {
        format!("{}:{}", self.storage, self.name)
    }

    /// The VM id that owns it, by its name.
    pub fn owner(&self) -> u32 {
        plugin::owner_of_name(&self.name).unwrap_or_default()
    }
}

/// An image format. (An alias, for a plain `&str` in `Volume` would have serde borrow it from its input.)
type Format = &'static str;

/// A volume.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Volume {
    /// Bytes.
    pub size: u64,
    /// Seconds since 1970.
    pub ctime: u64,
    /// Image format.
    #[serde(deserialize_with = "format")]
    pub format: Format,
    /// The file with its contents, where contents are kept.
    pub image: Option<PathBuf>,
    /// Its snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
    /// What a linked clone stands on, as its storage knows it: `100/base-100-disk-0.raw`, `base-100-disk-0@__base__`.
    pub parent: Option<String>,
}

/// A snapshot of a volume. Its contents are in a file of their own, see `Sim::snapshots_of`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// Bytes of the volume when it was taken.
    pub size: u64,
    /// Bytes of it that were written.
    pub used: u64,
}

fn format<'de, D: Deserializer<'de>>(deserializer: D) -> Result<&'static str, D::Error> {
    let word = String::deserialize(deserializer)?;
    plugin::format_named(&word).ok_or_else(|| D::Error::custom(format!("`{word}` is no image format")))
}

/// Blocks of a volume group that nobody has any more, with what was written there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freed {
    /// The node of the volume group, `None` for a shared one.
    pub node: Option<String>,
    /// The volume group, as `world::Storage::place` names it.
    pub place: String,
    /// The file with the blocks.
    pub file: PathBuf,
}

/// A storage and how full it is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Storage {
    /// As the world has it.
    #[serde(flatten)]
    pub config: world::Storage,
    /// Bytes of the filesystem.
    pub total: u64,
    /// Whether a fault has filled it.
    pub full: bool,
}

/// A drive that QEMU has.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct QemuDrive {
    /// The volume.
    pub volume: VolumeKey,
    /// What the guest was told of it.
    #[serde(serialize_with = "as_text", deserialize_with = "from_text")]
    pub drive: Drive,
    /// Bytes QEMU shows the guest; behind the volume's after a resize through another VM.
    pub size: u64,
}

fn as_text<S: serde::Serializer>(drive: &Drive, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(drive)
}

fn from_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Drive, D::Error> {
    let text = String::deserialize(deserializer)?;
    Drive::parse("drive", &text).map_err(D::Error::custom)
}

/// A virtual machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a condition of its own, in any combination")]
pub struct Vm {
    /// Node whose directory has the config.
    pub node: String,
    /// The config.
    pub conf: Conf,
    /// Whether QEMU runs.
    pub running: bool,
    /// What stands behind its disks.
    pub guest: world::Guest,
    /// What QEMU has, by slot.
    pub drives: BTreeMap<String, QemuDrive>,
    /// QEMU does not answer.
    pub hung: bool,
    /// The guest does not let go of controllers.
    pub busy: bool,
    /// A command to the hung QEMU holds its socket.
    pub stuck: bool,
    /// Whether the guest is paused.
    pub paused: bool,
    /// HA state.
    pub hastate: Option<String>,
    /// When QEMU was started, in seconds since the start of the simulator.
    pub started: u64,
}

/// How a node fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// It answers.
    #[default]
    Online,
    /// It does not.
    Dead,
    /// It runs, and the other nodes and it do not hear each other.
    Cut,
    /// It is down, and comes back by itself.
    Rebooting,
}

/// Everything that changes. Volumes, VMs and tasks are saved one by one, the requests seen not at all.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// Nodes.
    pub nodes: BTreeMap<String, NodeState>,
    /// When dead nodes died, in seconds since the start.
    pub died: BTreeMap<String, u64>,
    /// Storages by id.
    pub storages: BTreeMap<String, Storage>,
    /// All volumes.
    #[serde(skip)]
    pub volumes: Tracked<VolumeKey, Volume>,
    /// VMs by id.
    #[serde(skip)]
    pub vms: Tracked<u32, Vm>,
    /// Privileges.
    pub access: Access,
    /// Secrets of the tokens; `None` for one that has expired.
    pub tokens: BTreeMap<String, Option<String>>,
    /// Secrets of expired tokens, for the way back.
    pub expired: BTreeMap<String, String>,
    /// What is said of tokens beside their secrets.
    pub token_notes: BTreeMap<String, TokenNote>,
    /// Users by `name@realm`.
    pub users: BTreeMap<String, User>,
    /// Hosts that have a name here but are no nodes.
    pub hosts: BTreeSet<String>,
    /// HA resources by id.
    pub ha: super::api::Sections,
    /// What the HA manager has been asked for and has not begun, by resource: `migrate NODE`, `relocate NODE`, `stop`.
    pub ha_requests: BTreeMap<String, String>,
    /// HA rules by id.
    pub ha_rules: super::api::Sections,
    /// HA groups by id, of a release that has them.
    pub ha_groups: super::api::Sections,
    /// Whether the HA manager acts on its resources.
    pub ha_acts: bool,
    /// Nodes that the HA manager is fencing, and since when, in seconds since the start.
    pub fencing: BTreeMap<String, u64>,
    /// What pools are for.
    pub pool_comments: BTreeMap<String, String>,
    /// Backup jobs by id.
    pub jobs: super::api::Sections,
    /// Replication jobs by id.
    pub replications: super::api::Sections,
    /// Storages whose mount is missing.
    pub unmounted: BTreeSet<String>,
    /// ISO images, templates and the like.
    pub files: Vec<StorageFile>,
    /// Guests' systems by VM id.
    pub systems: BTreeMap<u32, GuestSystem>,
    /// The release whose API is spoken.
    pub version: super::version::Version,
    /// VMs whose guest agent does not answer.
    pub silent_agents: BTreeSet<u32>,
    /// The nodes that live are too few to write.
    pub quorum_lost: bool,
    /// Name of the cluster, empty for a node alone.
    pub cluster: String,
    /// Addresses of nodes, where the world has them.
    pub addresses: BTreeMap<String, String>,
    /// Resource pools.
    pub pools: BTreeSet<String>,
    /// All tasks, oldest first.
    #[serde(skip)]
    pub tasks: Tasks,
    /// Faults that wait.
    pub faults: Pending,
    /// Requests seen.
    #[serde(skip)]
    pub log: VecDeque<LogEntry>,
    /// Requests the simulator does not model, and how often they came.
    pub unmodelled: BTreeMap<String, u64>,
    /// How often all tickets have been made worthless.
    pub ticket_age: u32,
    /// What storages have in use, as last added up.
    #[serde(skip)]
    pub sums: Sums,
    /// Which VMs have which volumes open, as last looked at.
    #[serde(skip)]
    pub holders: Holders,
    /// What is got wrong on purpose.
    #[doc(hidden)]
    #[serde(skip)]
    pub misreading: Option<super::misreading::Misreading>,
    /// What volumes of thick LVM held that are gone, oldest first: new ones are made of it.
    pub freed: Vec<Freed>,
    /// In which order the keys of config calls are applied.
    pub key_order: super::rules::order::KeyOrder,
    /// Source of process ids and uuids.
    pub counter: u32,
}

impl State {
    /// The storage, as a call on `node` finds it (pve-storage `Storage.pm:storage_config`, `storage_check_enabled`).
    pub fn storage(&self, node: &str, id: &str) -> Result<&Storage, PveError> {
        let storage =
            self.storages.get(id).ok_or_else(|| PveError::die(format!("storage '{id}' does not exist")))?;
        if !storage.config.enabled {
            return Err(PveError::die(format!("storage '{id}' is disabled")));
        }
        if !storage.config.is_on(node) {
            return Err(PveError::die(format!("storage '{id}' is not available on node '{node}'")));
        }
        if self.unmounted.contains(id)
            && let Some(error) = plugin::inactive(&storage.config)
        {
            return Err(error);
        }
        Ok(storage)
    }

    /// Where the volume `volid` is, seen from `node`, whether it exists or not (pve-storage `Plugin.pm:parse_volume_id`,
    /// `Storage.pm:parse_volname`).
    pub fn volume_key(&self, node: &str, volid: &str) -> Result<VolumeKey, PveError> {
        let Some((storage, name)) = volid.split_once(':') else {
            return Err(PveError::die(format!("unable to parse volume ID '{volid}'")));
        };
        let config = &self
            .storages
            .get(storage)
            .ok_or_else(|| PveError::die(format!("storage '{storage}' does not exist")))?
            .config;
        Ok(self.resolve(node, config, &plugin::parse(config, name)?.name))
    }

    /// The key of a volume by its name without a base: that of the entry it was made through, where two entries stand
    /// for one volume group.
    pub fn resolve(&self, node: &str, config: &world::Storage, name: &str) -> VolumeKey {
        let key = |config: &world::Storage| VolumeKey {
            storage: config.id.clone(),
            node: (!config.shared).then(|| node.to_owned()),
            name: name.to_owned(),
        };
        let own = key(config);
        if self.volumes.contains_key(&own) {
            return own;
        }
        let others = self.same_place(config).filter(|other| other.id != config.id).map(key);
        others.into_iter().find(|other| self.volumes.contains_key(other)).unwrap_or(own)
    }

    /// The entries whose volumes are kept where those of this one are, itself among them.
    pub fn same_place(&self, config: &world::Storage) -> impl Iterator<Item = &world::Storage> {
        let place = config.place();
        let shared = config.shared;
        let all = self.storages.values().map(|storage| &storage.config);
        all.filter(move |other| other.shared == shared && other.place() == place)
    }

    /// The volumes of a storage as `node` sees them, those made through another entry for the same place among them.
    pub fn volumes_on<'a>(
        &'a self,
        node: &'a str,
        config: &world::Storage,
    ) -> impl Iterator<Item = (&'a VolumeKey, &'a Volume)> {
        let ids: BTreeSet<&str> = self.same_place(config).map(|other| other.id.as_str()).collect();
        ids.into_iter().flat_map(move |id| {
            let from = |node: Option<&str>| VolumeKey {
                storage: id.to_owned(),
                node: node.map(str::to_owned),
                name: String::new(),
            };
            // Those of the storage alone, and of no other node.
            let of_all = self.volumes.range(from(None)..from(Some("")));
            of_all.chain(self.volumes.range(from(Some(node))..from(Some(&format!("{node}\0")))))
        })
    }

    /// The id of a volume, with the base volume of a linked clone in front where the storage shows it.
    pub fn volid(&self, key: &VolumeKey) -> String {
        self.volid_through(&key.storage, key)
    }

    /// The same, through another entry for the same place.
    pub fn volid_through(&self, storage: &str, key: &VolumeKey) -> String {
        let parent = self.volumes.get(key).and_then(|volume| volume.parent.as_deref());
        let base = self.config_of(key).ok().zip(parent).and_then(|(config, of)| plugin::base_of(config, of));
        match base {
            Some(base) => format!("{storage}:{base}/{}", key.name),
            None => format!("{storage}:{}", key.name),
        }
    }

    /// Whether linked clones whose names show it stand on the volume (pve-storage
    /// `Storage.pm:volume_is_base_and_used`).
    pub fn is_base_in_use(&self, key: &VolumeKey) -> bool {
        let Ok(config) = self.config_of(key) else { return false };
        let node = key.node.as_deref().unwrap_or_default();
        let base = |volume: &Volume| {
            volume.parent.as_deref().and_then(|parent| plugin::base_of(config, parent)) == Some(&key.name)
        };
        plugin::parse(config, &key.name).is_ok_and(|name| name.is_base)
            && self.volumes_on(node, config).any(|(_, volume)| base(volume))
    }

    /// The snapshot of a volume that a clone stands on, if there is one. Only Ceph knows.
    pub fn cloned_snapshot(&self, key: &VolumeKey, only: Option<&str>) -> Option<String> {
        let config = self.config_of(key).ok().filter(|config| config.kind == world::Kind::Rbd)?;
        let node = key.node.as_deref().unwrap_or_default();
        self.volumes_on(node, config).find_map(|(_, volume)| {
            let (parent, snapshot) = volume.parent.as_deref()?.split_once('@')?;
            (parent == key.name && only.is_none_or(|only| only == snapshot)).then(|| snapshot.to_owned())
        })
    }

    /// Whether the cluster takes writes, seen from `node`.
    pub fn is_quorate(&self, node: &str) -> bool {
        !self.quorum_lost && self.nodes.get(node) != Some(&NodeState::Cut)
    }

    /// Whether the part of the cluster that lives takes writes.
    pub fn has_quorum(&self) -> bool {
        !self.quorum_lost
    }

    /// Whether `node` is online for a call that came in on `via` (pve-cluster `status.c`: what corosync says).
    pub fn hears(&self, via: Option<&str>, node: &str) -> bool {
        if via == Some(node) {
            return true;
        }
        // A node that is cut off hears nobody.
        let cut = via.and_then(|via| self.nodes.get(via)) == Some(&NodeState::Cut);
        !cut && self.nodes.get(node) == Some(&NodeState::Online)
    }

    /// The node that answers a call that came in on none in particular: the first one online.
    pub fn first_node(&self) -> String {
        let online = self.nodes.iter().find(|(_, state)| **state == NodeState::Online);
        online.or_else(|| self.nodes.iter().next()).map(|(node, _)| node.clone()).unwrap_or_default()
    }

    /// Whether a user exists and may come in (pve-access-control `AccessControl.pm:check_user_enabled`).
    pub fn user_is_enabled(&self, user: &str, now: u64) -> bool {
        let known = self.users.get(user);
        known.is_some_and(|user| user.enabled && (user.expire == 0 || user.expire >= now))
    }

    /// The address of a node.
    pub fn address(&self, node: &str) -> String {
        let index = self.nodes.keys().position(|name| name == node).unwrap_or_default();
        self.addresses.get(node).cloned().unwrap_or_else(|| format!("192.0.2.{}", index + 11))
    }

    /// The path PVE shows for a volume.
    pub fn path_of(&self, key: &VolumeKey) -> String {
        self.storages.get(&key.storage).map(|s| plugin::path(&s.config, &key.name)).unwrap_or_default()
    }

    /// The VM's config on `node` (qemu-server `AbstractConfig.pm:load_config`).
    pub fn vm_on(&self, node: &str, vmid: u32) -> Result<&Vm, PveError> {
        self.vms.get(&vmid).filter(|vm| vm.node == node).ok_or_else(|| no_config(node, vmid))
    }

    /// The same, to be changed.
    pub fn vm_on_mut(&mut self, node: &str, vmid: u32) -> Result<&mut Vm, PveError> {
        self.vms.get_mut(&vmid).filter(|vm| vm.node == node).ok_or_else(|| no_config(node, vmid))
    }

    /// The entry of a storage that a volume key names.
    pub fn config_of(&self, key: &VolumeKey) -> Result<&world::Storage, PveError> {
        let storage = self.storages.get(&key.storage);
        storage
            .map(|storage| &storage.config)
            .ok_or_else(|| PveError::die(format!("storage '{}' does not exist", key.storage)))
    }

    /// Refuses to use a volume that is not there, in the words of its storage.
    pub fn existing(&self, key: &VolumeKey) -> Result<&Volume, PveError> {
        let config = self.config_of(key)?;
        self.volumes.get(key).ok_or_else(|| plugin::missing(config, &key.name))
    }

    /// Whether a running VM has the volume open.
    pub fn is_open(&self, key: &VolumeKey) -> bool {
        !self.holders.of(&self.vms, key).is_empty()
    }
}

impl Volume {
    /// The names of its snapshots, oldest first.
    pub fn snapshot_names(&self) -> Vec<String> {
        self.snapshots.iter().map(|snapshot| snapshot.name.clone()).collect()
    }
}

fn no_config(node: &str, vmid: u32) -> PveError {
    PveError::die(format!("Configuration file 'nodes/{node}/qemu-server/{vmid}.conf' does not exist"))
}

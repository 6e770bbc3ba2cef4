//! What a simulated cluster consists of, as it stands in a world file (YAML). Plain data: a `World` is read once and
//! turned into running state by `Sim::start`.

mod qemu;

pub use qemu::Qemu;

use super::rules::access::AclEntry;
use super::version::Version;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A cluster: nodes, storages, VMs and who may do what.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct World {
    /// Names of the nodes.
    pub nodes: Vec<String>,
    /// Storages.
    pub storages: Vec<Storage>,
    /// Virtual machines.
    #[serde(default)]
    pub vms: Vec<Vm>,
    /// API tokens.
    pub tokens: Vec<Token>,
    /// Privileges by role; `Administrator` exists without being listed.
    #[serde(default)]
    pub roles: BTreeMap<String, BTreeSet<String>>,
    /// Access control entries. `root@pam` has every right without one.
    #[serde(default)]
    pub acl: Vec<AclEntry>,
    /// Resource pools that exist.
    #[serde(default)]
    pub pools: BTreeSet<String>,
    /// Name of the cluster; an empty one makes a node that stands alone.
    #[serde(default = "default_cluster")]
    pub cluster: String,
    /// Addresses of the nodes, documentation addresses without them.
    #[serde(default)]
    pub addresses: BTreeMap<String, String>,
    /// Passwords of users who may log in for a ticket.
    #[serde(default)]
    pub users: BTreeMap<String, String>,
    /// The release whose API is spoken: `9.2` or `8.4`.
    #[serde(default)]
    pub version: Version,
    /// Whether the HA manager acts: starts and stops its resources, and brings them back when their node is gone.
    #[serde(default)]
    pub ha_manager: bool,
    /// Members of groups of users.
    #[serde(default)]
    pub groups: BTreeMap<String, BTreeSet<String>>,
    /// Hosts whose name resolves but which are no members of the cluster and do not answer.
    #[serde(default)]
    pub hosts: BTreeSet<String>,
    /// What VMs run that are QEMU processes.
    #[serde(default)]
    pub qemu: Option<Qemu>,
}

/// The type of a storage: how its volumes are named, made and missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A directory.
    #[default]
    Dir,
    /// A directory mounted over NFS.
    Nfs,
    /// A directory mounted over CIFS.
    Cifs,
    /// Subvolumes of a btrfs.
    Btrfs,
    /// Logical volumes that take their space at once.
    Lvm,
    /// Logical volumes of a thin pool.
    Lvmthin,
    /// Volumes of a ZFS pool on the node.
    Zfspool,
    /// Images of a Ceph pool.
    Rbd,
}

impl Kind {
    /// The word of `storage.cfg`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Dir => "dir",
            Self::Nfs => "nfs",
            Self::Cifs => "cifs",
            Self::Btrfs => "btrfs",
            Self::Lvm => "lvm",
            Self::Lvmthin => "lvmthin",
            Self::Zfspool => "zfspool",
            Self::Rbd => "rbd",
        }
    }

    /// The type of this word.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Dir, Self::Nfs, Self::Cifs, Self::Btrfs, Self::Lvm, Self::Lvmthin, Self::Zfspool, Self::Rbd]
            .into_iter()
            .find(|kind| kind.word() == word)
    }

    /// Whether volumes are files.
    pub fn is_directory(self) -> bool {
        matches!(self, Self::Dir | Self::Nfs | Self::Cifs | Self::Btrfs)
    }

    /// Whether all nodes see the same volumes whatever the entry says (pve-storage `Plugin.pm:@SHARED_STORAGE`).
    pub fn is_always_shared(self) -> bool {
        matches!(self, Self::Nfs | Self::Cifs | Self::Rbd)
    }

    /// Whether volumes are logical volumes.
    pub fn is_lvm(self) -> bool {
        matches!(self, Self::Lvm | Self::Lvmthin)
    }
}

/// A storage.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Storage {
    /// Storage id.
    pub id: String,
    /// Its type.
    #[serde(default, rename = "type")]
    pub kind: Kind,
    /// The path is a mount point: without a mount the storage is not active.
    #[serde(default)]
    pub is_mountpoint: bool,
    /// Further keys of `storage.cfg`, such as `vgname` or `prune-backups`.
    #[serde(default)]
    pub properties: BTreeMap<String, String>,
    /// Whether all nodes see the same volumes.
    #[serde(default)]
    pub shared: bool,
    /// Nodes that have it; empty means all.
    #[serde(default)]
    pub nodes: Vec<String>,
    /// Size of the filesystem, such as `100G`.
    #[serde(default = "default_capacity")]
    pub capacity: String,
    /// Content types.
    #[serde(default = "default_content")]
    pub content: String,
    /// Path on the nodes; `/var/lib/vz` for `local`, `/mnt/pve/<id>` else.
    #[serde(default)]
    pub path: Option<String>,
    /// Whether the storage is enabled.
    #[serde(default = "yes")]
    pub enabled: bool,
}

/// A virtual machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// VM id.
    pub vmid: u32,
    /// Node it is on.
    pub node: String,
    /// Name.
    pub name: String,
    /// Whether it runs.
    #[serde(default = "yes")]
    pub running: bool,
    /// What stands behind it: `true` makes its disks block devices of this machine, `qemu` makes it a QEMU.
    #[serde(default)]
    pub guest: Guest,
    /// Keys of the config, on top of what every VM has (`scsihw`, `memory`, `smbios1`, `scsi0`, `boot`, …). An empty
    /// value takes a key away.
    #[serde(default)]
    pub config: BTreeMap<String, String>,
    /// Resource pool.
    #[serde(default)]
    pub pool: Option<String>,
    /// State of the HA manager's resource, if the VM is one.
    #[serde(default)]
    pub hastate: Option<String>,
}

/// What stands behind the disks of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Guest {
    /// Nothing: the VM has disks only as far as Proxmox VE knows.
    #[default]
    Memory,
    /// Loop devices of this machine, in a sysfs and dev tree of the VM's own.
    Machine,
    /// A QEMU process with a kernel of its own, as `World::qemu` says.
    Qemu,
}

impl<'de> Deserialize<'de> for Guest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Flag(bool),
            Word(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Flag(true) => Ok(Self::Machine),
            Written::Flag(false) => Ok(Self::Memory),
            Written::Word(word) => match word.as_str() {
                "machine" | "true" => Ok(Self::Machine),
                "memory" | "false" => Ok(Self::Memory),
                "qemu" => Ok(Self::Qemu),
                other => Err(serde::de::Error::custom(format!(
                    "guest is true, false, memory or qemu, not `{other}`"
                ))),
            },
        }
    }
}

/// An API token.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// `user@realm!name`.
    pub id: String,
    /// The secret, a uuid in a real cluster.
    pub secret: String,
    /// Privilege separation: the token has only what entries of its own give.
    #[serde(default)]
    pub privsep: bool,
}

impl Token {
    /// What follows `Authorization: ` in a request.
    pub fn header(&self) -> String {
        format!("PVEAPIToken={}={}", self.id, self.secret)
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token").field("id", &self.id).finish_non_exhaustive()
    }
}

fn yes() -> bool {
    true
}

fn default_capacity() -> String {
    "100G".to_owned()
}

fn default_cluster() -> String {
    "sim".to_owned()
}

fn default_content() -> String {
    "images".to_owned()
}

impl Storage {
    /// Whether `node` has the storage.
    pub fn is_on(&self, node: &str) -> bool {
        self.nodes.is_empty() || self.nodes.iter().any(|name| name == node)
    }

    /// The directory on the nodes.
    pub fn directory(&self) -> String {
        self.path.clone().unwrap_or_else(|| {
            if self.id == "local" { "/var/lib/vz".to_owned() } else { format!("/mnt/pve/{}", self.id) }
        })
    }

    /// The volume group of an LVM storage; its id without a `vgname`.
    pub fn volume_group(&self) -> &str {
        self.properties.get("vgname").unwrap_or(&self.id)
    }

    /// The pool of a ZFS or Ceph storage: its id, or `rbd`, without a `pool` (`RBDPlugin.pm:get_rbd_path`).
    pub fn pool(&self) -> &str {
        let default = if self.kind == Kind::Rbd { "rbd" } else { &self.id };
        self.properties.get("pool").map_or(default, String::as_str)
    }

    /// Whether a ZFS pool's volumes take their space as they are written.
    pub fn is_sparse(&self) -> bool {
        self.properties.get("sparse").is_some_and(|value| value == "1")
    }

    /// Whether images of a Ceph pool are opened through the kernel.
    pub fn krbd(&self) -> bool {
        self.properties.get("krbd").is_some_and(|value| value == "1")
    }

    /// Whether the storage may hold this type of content.
    pub fn has_content(&self, kind: &str) -> bool {
        self.content.split(',').any(|content| content.trim() == kind)
    }

    /// What the volumes are really kept in: two entries for one volume group see each other's volumes.
    pub fn place(&self) -> String {
        match self.kind {
            Kind::Lvm => format!("lvm {}", self.volume_group()),
            Kind::Lvmthin => {
                let pool = self.properties.get("thinpool").unwrap_or(&self.id);
                format!("thin {}/{pool}", self.volume_group())
            }
            Kind::Zfspool => format!("zfs {}", self.pool()),
            Kind::Rbd => {
                format!("rbd {}/{}", self.pool(), self.properties.get("namespace").map_or("", String::as_str))
            }
            Kind::Dir | Kind::Nfs | Kind::Cifs | Kind::Btrfs => format!("dir {}", self.directory()),
        }
    }

    /// Whether VM snapshots become chains of volumes.
    pub fn chains(&self) -> bool {
        self.properties.get("snapshot-as-volume-chain").is_some_and(|value| value == "1")
    }
}

/// Privileges the driver needs for everything but holders.
pub const CSI_PRIVILEGES: &[&str] =
    &["VM.Audit", "VM.Config.Disk", "Datastore.Allocate", "Datastore.AllocateSpace", "Datastore.Audit"];

impl World {
    /// Reads a world file.
    pub fn from_yaml(text: &str) -> Result<Self, WorldError> {
        serde_saphyr::from_str(text).map_err(|error| WorldError::Syntax(error.to_string()))
    }

    /// Two nodes, three running worker VMs that are all this machine, local and shared directory storages, and four
    /// tokens: `root@pam!root`, `csi@pve!csi` (five privileges), `csi@pve!holder` (those, `VM.Allocate` and
    /// `VM.Config.Options`) and `nobody@pve!tok`.
    pub fn builtin() -> Self {
        let storage = |id: &str, shared| Storage {
            id: id.to_owned(),
            shared,
            nodes: Vec::new(),
            capacity: default_capacity(),
            content: if id == "local" {
                "images,iso,backup,vztmpl,snippets".to_owned()
            } else {
                default_content()
            },
            enabled: true,
            ..Storage::default()
        };
        let vm = |vmid: u32, node: &str, name: &str| Vm {
            vmid,
            node: node.to_owned(),
            name: name.to_owned(),
            running: true,
            guest: Guest::Machine,
            config: BTreeMap::new(),
            pool: None,
            hastate: None,
        };
        let token = |id: &str, digit: char, privsep| Token {
            id: id.to_owned(),
            secret: format!(
                "{0}-{1}-4{2}-8{2}-{3}",
                rep(digit, 8),
                rep(digit, 4),
                rep(digit, 3),
                rep(digit, 12)
            ),
            privsep,
        };
        let role = |more: &[&str]| CSI_PRIVILEGES.iter().chain(more).map(|p| (*p).to_owned()).collect();
        let entry = |who: &str, role: &str| AclEntry {
            path: "/".to_owned(),
            who: who.to_owned(),
            role: role.to_owned(),
            propagate: true,
        };
        Self {
            nodes: vec!["pve1".to_owned(), "pve2".to_owned()],
            storages: vec![storage("local", false), storage("data", false), storage("shared", true)],
            vms: vec![vm(101, "pve1", "worker-1"), vm(102, "pve1", "worker-2"), vm(103, "pve2", "worker-3")],
            tokens: vec![
                token("root@pam!root", '1', false),
                token("csi@pve!csi", '2', true),
                token("csi@pve!holder", '3', true),
                token("nobody@pve!tok", '4', true),
            ],
            roles: BTreeMap::from([
                ("CSI".to_owned(), role(&[])),
                ("CSIHolder".to_owned(), role(&["VM.Allocate", "VM.Config.Options"])),
                ("NoAccess".to_owned(), BTreeSet::new()),
            ]),
            acl: vec![
                entry("csi@pve", "Administrator"),
                entry("csi@pve!csi", "CSI"),
                entry("csi@pve!holder", "CSIHolder"),
            ],
            pools: BTreeSet::from(["csi".to_owned()]),
            cluster: default_cluster(),
            addresses: BTreeMap::new(),
            users: BTreeMap::new(),
            version: Version::default(),
            ha_manager: false,
            groups: BTreeMap::new(),
            hosts: BTreeSet::new(),
            qemu: None,
        }
    }

    /// The token of this id.
    pub fn token(&self, id: &str) -> Option<&Token> {
        self.tokens.iter().find(|token| token.id == id)
    }
}

fn rep(digit: char, count: usize) -> String {
    std::iter::repeat_n(digit, count).collect()
}

/// A world that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum WorldError {
    /// A VM is to be a QEMU, and nothing says what it runs.
    #[error("VM {0} has the guest `qemu`, and the world has no `qemu` with the kernel that it runs")]
    Qemu(u32),
    /// The file is not YAML of the right shape.
    #[error("cannot read the world: {0}")]
    Syntax(String),
    /// A storage's capacity is no size.
    #[error("storage `{0}` has the capacity `{1}`, which is not a size such as `100G`")]
    Capacity(String, String),
    /// A VM stands on a node that is not there.
    #[error("VM {0} is on the node `{1}`, which the world does not have")]
    Node(u32, String),
    /// A drive of a VM does not parse.
    #[error("VM {0} has a bad value of `{1}`: {2}")]
    Drive(u32, String, String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_world_file_needs_little() {
        let world = World::from_yaml(
            "nodes: [pve1]\nstorages:\n- id: local\n- {id: shared, shared: true, capacity: 10G}\nvms:\n- {vmid: 100, node: pve1, name: w1, guest: true}\n- {vmid: 101, node: pve1, name: w2, guest: memory, running: false, config: {hotplug: \"0\"}}\ntokens:\n- {id: root@pam!root, secret: s}\n",
        );
        let world = world.expect("the file is well formed");
        assert_eq!(world.vms[0].guest, Guest::Machine);
        assert_eq!(world.vms[1].guest, Guest::Memory);
        assert_eq!(world.vms[1].config["hotplug"], "0");
    }

    #[test]
    fn the_built_in_world_can_be_written_and_read() {
        let text = serde_saphyr::to_string(&World::builtin()).expect("plain data can be written");
        let world = World::from_yaml(&text).expect("what was written can be read");
        assert_eq!(world.vms.len(), 3);
        assert_eq!(world.vms[0].guest, Guest::Machine);
    }
}

//! From a world file to a running cluster.

use super::clock::{Clock, Profile};
use super::contents::Contents;
use super::guest::Guests;
use super::records::User;
use super::rules::access::{Access, Group};
use super::rules::conf::Conf;
use super::rules::drive::{Drive, format_size, is_drive_key, parse_size};
use super::rules::plugin;
use super::save::{Journal, SaveError};
use super::state::{NodeState, QemuDrive, State, Storage, Vm, Volume};
use super::world::{self, Guest, World, WorldError};
use super::{Inner, Sim, qemu};
use sha1::{Digest as _, Sha1};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

/// How to run a world.
#[derive(Debug, Clone)]
pub struct Options {
    /// What things cost.
    pub time: Profile,
    /// Directory for volumes and guests, whose `guests` are emptied at the start. Without it everything is in memory
    /// and no VM has devices.
    pub state: Option<PathBuf>,
    /// Whether the cluster goes on from what an earlier run has left in `state`. Without it the directory's `storage` is
    /// emptied at the start and nothing outlives the run.
    pub keep: bool,
    /// What the clock reads at the start, in seconds since 1970.
    pub epoch: u64,
}

impl Default for Options {
    fn default() -> Self {
        // 2026-11-20 12:00 UTC; a fixed time makes runs repeatable.
        Self { time: Profile::Recorded, state: None, keep: false, epoch: 1_795_176_000 }
    }
}

/// Why a cluster cannot run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The world contradicts itself.
    #[error(transparent)]
    World(#[from] WorldError),
    /// A volume of the world cannot be made.
    #[error("cannot make the volume `{0}`")]
    Volume(String, #[source] std::io::Error),
    /// What an earlier run has left cannot be used, or the state cannot be written.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// Volumes of an earlier run cannot be removed.
    #[error("cannot empty `{0}`")]
    Storage(PathBuf, #[source] std::io::Error),
    /// The guests' trees cannot be made.
    #[error("cannot set up the guests under `{0}`")]
    Guests(PathBuf, #[source] std::io::Error),
    /// QEMU processes cannot be run.
    #[error("cannot set up the QEMU of VMs")]
    Machines(#[source] std::io::Error),
    /// A QEMU cannot be started.
    #[error("cannot start the QEMU of VM {0}")]
    Power(u32, #[source] std::io::Error),
    /// A disk cannot be shown to a guest.
    #[error("cannot plug `{1}` into the guest of VM {0}")]
    Plug(u32, String, #[source] std::io::Error),
}

fn sha1_of(text: &str) -> String {
    Sha1::digest(text).iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// A uuid that is always the same for the same name, so that a restart finds the same VMs.
pub(crate) fn uuid_of(name: &str) -> String {
    let hash = Sha1::digest(name);
    let mut bytes = [0_u8; 16];
    bytes.copy_from_slice(&hash[..16]);
    uuid::Builder::from_random_bytes(bytes).into_uuid().to_string()
}

impl Sim {
    /// Starts a cluster. Must be called within a tokio runtime; blocks for the moment it takes to make boot disks.
    #[expect(clippy::needless_pass_by_value, reason = "a world and its options become the cluster")]
    pub fn start(world: World, options: Options) -> Result<Self, StartError> {
        let mut clock = Clock::new(options.time, options.epoch);
        let mark = sha1_of(&format!("{world:?}"));
        let kept = options.state.as_deref().filter(|_| options.keep);
        let saved = kept.map(|directory| Journal::read(directory, &mark)).transpose()?.flatten();
        let images = options.state.as_ref().map(|state| state.join("storage"));
        let wants_machine = world.vms.iter().any(|vm| vm.guest == Guest::Machine);
        let guests = match &options.state {
            Some(directory) if wants_machine => Some(Arc::new(
                Guests::create(directory).map_err(|error| StartError::Guests(directory.clone(), error))?,
            )),
            _ => None,
        };
        let real = world.vms.iter().find(|vm| vm.guest == Guest::Qemu).map(|vm| vm.vmid);
        let (machines, ended) = match (&options.state, real) {
            (Some(directory), Some(vmid)) => {
                let settings = world.qemu.clone().ok_or(WorldError::Qemu(vmid))?;
                let (sender, ended) = tokio::sync::mpsc::unbounded_channel();
                let machines = qemu::Machines::create(directory, settings, options.time, sender);
                (Some(Arc::new(machines.map_err(StartError::Machines)?)), Some(ended))
            }
            _ => (None, None),
        };
        if let (Some(images), None) = (&images, &saved) {
            // Nothing is remembered of earlier runs, so nothing may be found: a new volume is blank.
            match std::fs::remove_dir_all(images) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(StartError::Storage(images.clone(), error));
                }
                _ => {}
            }
        }
        let goes_on = saved.is_some();
        let state = match saved {
            Some(saved) => {
                clock = clock.going_on(saved.elapsed);
                saved.state
            }
            None => base_state(&world)?,
        };
        let sim = Self {
            inner: Arc::new(Inner {
                state: Mutex::new(state),
                clock,
                locks: super::locks::Locks::default(),
                held: Mutex::default(),
                guests,
                real: machines,
                machines: Mutex::default(),
                contents: if images.is_some() { Contents::Files } else { Contents::in_memory() },
                images,
                tasks: tokio::sync::Notify::new(),
                nodes: tokio::sync::Notify::new(),
                journal: OnceLock::new(),
            }),
        };
        if let Some(mut ended) = ended {
            let inner = Arc::downgrade(&sim.inner);
            tokio::spawn(async move {
                while let Some((vmid, number)) = ended.recv().await {
                    let Some(inner) = inner.upgrade() else { return };
                    Self { inner }.machine_ended(vmid, number);
                }
            });
        }
        if goes_on {
            sim.resume()?;
        } else {
            for vm in &world.vms {
                sim.add_vm(vm)?;
            }
        }
        if let Some(directory) = kept {
            let elapsed = clock.elapsed();
            let journal = sim.change(|state| Journal::begin(directory, &mark, state, elapsed))?;
            // It is set once, here.
            let _ = sim.inner.journal.set(Arc::new(journal));
        }
        if let Some(guests) = sim.guests() {
            guests.watch();
        }
        if sim.read(|state| state.ha_acts) {
            sim.run_ha_manager();
        }
        Ok(sim)
    }

    /// A cluster in memory whose acts cost no time: for tests.
    pub fn in_memory(world: World) -> Result<Self, StartError> {
        Self::start(world, Options { time: Profile::None, ..Options::default() })
    }

    /// Adds a VM to the running cluster; disks it names with a `size=` are made where they are missing.
    pub fn add_vm(&self, vm: &world::Vm) -> Result<(), StartError> {
        let machine = vm.guest == Guest::Machine && self.guests().is_some();
        let guest = match vm.guest {
            Guest::Machine if machine => Guest::Machine,
            Guest::Qemu if self.inner.real.is_some() => Guest::Qemu,
            _ => Guest::Memory,
        };
        let conf = initial_conf(vm)?;
        for (_, drive) in Conf::disks(&conf.current).chain(Conf::disks(&conf.pending)) {
            let size = drive.options.get("size").and_then(|size| parse_size(size)).unwrap_or(0);
            self.ensure_volume(&vm.node, &drive.file, size)?;
        }
        let now = self.clock().elapsed().as_secs();
        self.change(|state| {
            state.access.pools.extend(vm.pool.clone().map(|pool| (vm.vmid, pool)));
            if let Some(said) = vm.hastate.as_deref() {
                // What the manager says of a VM, it says of a resource.
                let sid = format!("vm:{}", vm.vmid);
                let wanted = ["ignored", "stopped", "disabled"].into_iter().find(|wanted| *wanted == said);
                let section = [("sid", sid.as_str()), ("type", "vm"), ("state", wanted.unwrap_or("started"))];
                let section = section.map(|(key, value)| (key.to_owned(), value.into()));
                state.ha.insert(sid.clone(), section.into_iter().collect());
            }
            state.vms.insert(
                vm.vmid,
                Vm {
                    node: vm.node.clone(),
                    conf: conf.clone(),
                    running: vm.running,
                    guest,
                    drives: BTreeMap::new(),
                    hung: false,
                    busy: false,
                    paused: false,
                    stuck: false,
                    hastate: vm.hastate.clone(),
                    started: now,
                },
            );
        });
        if let (true, Some(guests)) = (machine, self.guests()) {
            guests
                .add_machine(vm.vmid, conf.uuid())
                .map_err(|error| StartError::Guests(guests.directory().to_owned(), error))?;
        }
        if vm.running {
            self.boot(vm.vmid).map_err(|(file, error)| StartError::Plug(vm.vmid, file, error))?;
        }
        Ok(())
    }

    /// Makes a volume where it is missing.
    pub(crate) fn ensure_volume(&self, node: &str, volid: &str, size: u64) -> Result<(), StartError> {
        let Ok(key) = self.read(|state| state.volume_key(node, volid)) else { return Ok(()) };
        if self.read(|state| state.volumes.contains_key(&key)) {
            return Ok(());
        }
        let image = self.image_of(&key);
        self.contents()
            .make(&self.place_of(&key), size)
            .map_err(|error| StartError::Volume(volid.to_owned(), error))?;
        let ctime = self.clock().now();
        self.change(|state| {
            let format = state.config_of(&key).map_or("raw", |config| plugin::format_of(config, &key.name));
            let volume = Volume { size, ctime, format, image, snapshots: Vec::new(), parent: None };
            state.volumes.insert(key, volume);
        });
        Ok(())
    }

    /// Gives QEMU every disk of the current config. Blocks while loop devices are made.
    pub(crate) fn boot(&self, vmid: u32) -> Result<(), (String, std::io::Error)> {
        // A QEMU that ended without a word, as with its node.
        self.power_off_in_memory(vmid);
        let drives = self.change(|state| {
            let Some(vm) = state.vms.get(&vmid) else { return Vec::new() };
            let disks: Vec<(String, Drive)> =
                Conf::disks(&vm.conf.current).map(|(slot, drive)| (slot.to_owned(), drive)).collect();
            let found: Vec<(String, QemuDrive)> = disks
                .into_iter()
                .filter_map(|(slot, drive)| {
                    let volume = state.volume_key(&state.vms.get(&vmid)?.node, &drive.file).ok()?;
                    let size = state.volumes.get(&volume)?.size;
                    Some((slot, QemuDrive { volume, drive, size }))
                })
                .collect();
            found
        });
        for (slot, drive) in drives {
            let file = drive.drive.file.clone();
            self.show(vmid, &slot, &drive).map_err(|error| (file, error))?;
            self.change(|state| {
                if let Some(vm) = state.vms.get_mut(&vmid) {
                    vm.drives.insert(slot, drive);
                }
            });
        }
        if self.is_qemu(vmid) {
            self.power_machine(vmid).map_err(|error| ("QEMU".to_owned(), error))?;
        }
        Ok(())
    }

    /// Whether the VM is a QEMU of its own.
    pub(crate) fn is_qemu(&self, vmid: u32) -> bool {
        self.read(|state| state.vms.get(&vmid).is_some_and(|vm| vm.guest == Guest::Qemu))
    }

    /// Shows a drive to the VM's guest, if it has one. Blocks while a loop device is made.
    pub(crate) fn show(&self, vmid: u32, slot: &str, drive: &QemuDrive) -> std::io::Result<()> {
        self.plug_in_memory(vmid, slot, drive);
        let machine = self.read(|state| state.vms.get(&vmid).is_some_and(|vm| vm.guest == Guest::Machine));
        let (Some(guests), true) = (self.guests(), machine) else { return Ok(()) };
        let (Some(image), Some(number)) = (
            self.read(|state| state.volumes.get(&drive.volume).and_then(|volume| volume.image.clone())),
            super::rules::drive::index_of(slot, "scsi"),
        ) else {
            return Ok(());
        };
        guests.plug(vmid, guest_disk(number, image, &drive.drive))
    }
}

/// What a guest is told of a drive.
pub(crate) fn guest_disk(slot: u32, image: PathBuf, drive: &Drive) -> super::guest::Disk {
    let wwn = drive.options.get("wwn").and_then(|wwn| u64::from_str_radix(wwn.strip_prefix("0x")?, 16).ok());
    super::guest::Disk {
        slot,
        image,
        wwn,
        serial: drive.options.get("serial").cloned(),
        ssd: drive.flag("ssd"),
        read_only: drive.flag("ro"),
    }
}

fn base_state(world: &World) -> Result<State, StartError> {
    let mut state = State {
        nodes: world.nodes.iter().map(|node| (node.clone(), NodeState::Online)).collect(),
        pools: world.pools.clone(),
        cluster: world.cluster.clone(),
        addresses: world.addresses.clone(),
        users: users_of(world),
        version: world.version,
        ha_acts: world.ha_manager,
        hosts: world.hosts.clone(),
        access: Access {
            roles: world.roles.clone(),
            acl: world.acl.clone(),
            pools: BTreeMap::new(),
            separated: world
                .tokens
                .iter()
                .filter(|token| token.privsep)
                .map(|token| token.id.clone())
                .collect(),
            groups: world
                .groups
                .iter()
                .map(|(name, users)| (name.clone(), Group { users: users.clone(), comment: None }))
                .collect(),
            eight: world.version.is_eight(),
            ..Access::default()
        },
        tokens: world.tokens.iter().map(|token| (token.id.clone(), Some(token.secret.clone()))).collect(),
        ..State::default()
    };
    for storage in &world.storages {
        let total = parse_size(&storage.capacity)
            .ok_or_else(|| WorldError::Capacity(storage.id.clone(), storage.capacity.clone()))?;
        let mut config = storage.clone();
        config.shared |= config.kind.is_always_shared();
        state.storages.insert(storage.id.clone(), Storage { config, total, full: false });
    }
    if let Some(vm) = world.vms.iter().find(|vm| !state.nodes.contains_key(&vm.node)) {
        return Err(WorldError::Node(vm.vmid, vm.node.clone()).into());
    }
    Ok(state)
}

/// Everybody whom the world names: with a password, in a group, in an entry, or before the `!` of a token.
fn users_of(world: &World) -> BTreeMap<String, User> {
    let owners = world.tokens.iter().filter_map(|token| token.id.split('!').next());
    let named = world.acl.iter().filter_map(|entry| entry.who.split('!').next());
    let members = world.groups.values().flatten().map(String::as_str);
    let everybody = world.users.keys().map(String::as_str).chain(owners).chain(named).chain(members);
    everybody
        .chain(["root@pam"])
        .filter(|name| !name.starts_with('@'))
        .map(|name| {
            let password = world.users.get(name).cloned();
            (name.to_owned(), User { password, enabled: true, ..User::default() })
        })
        .collect()
}

/// What every VM has, and the world's keys on top.
fn initial_conf(vm: &world::Vm) -> Result<Conf, StartError> {
    let vmid = vm.vmid;
    let mut conf = Conf::default();
    let defaults = [
        ("name", vm.name.clone()),
        ("memory", "2048".to_owned()),
        ("cores", "2".to_owned()),
        ("scsihw", "virtio-scsi-single".to_owned()),
        ("ostype", "l26".to_owned()),
        ("smbios1", format!("uuid={}", uuid_of(&format!("smbios1 of VM {vmid}")))),
        ("vmgenid", uuid_of(&format!("vmgenid of VM {vmid}"))),
        ("scsi0", format!("local:{vmid}/vm-{vmid}-disk-0.raw,size={}", format_size(1 << 30))),
        ("boot", "order=scsi0".to_owned()),
    ];
    conf.current.extend(defaults.into_iter().map(|(key, value)| (key.to_owned(), value)));
    for (key, value) in &vm.config {
        if value.is_empty() {
            conf.current.remove(key);
        } else if is_drive_key(key) && !key.starts_with("unused") {
            let drive = Drive::parse(key, value)
                .map_err(|error| WorldError::Drive(vmid, key.clone(), error.trim().to_owned()))?;
            conf.current.insert(key.clone(), drive.to_string());
        } else {
            conf.current.insert(key.clone(), value.clone());
        }
    }
    Ok(conf)
}

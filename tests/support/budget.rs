//! How many requests each operation sends, with so many VMs in the region.

use std::collections::BTreeMap;

use proxmox_csi::{
    pve::client::Token,
    sim::{Options, Sim, World, clock::Profile, world},
};
use tokio::time::Instant;

use super::{Bench, CSI, GIB, new_volume};

/// What was counted of an operation.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Count {
    /// Requests of the operation itself, polls of its task included.
    pub own: usize,
    /// Requests of sweeps and of the region's poll, which serve all operations that wait for them.
    pub shared: usize,
    /// How long it took at recorded latencies, in milliseconds, the sweep included.
    pub ms: u128,
}

/// The operations, in the order of a volume's life.
pub const OPERATIONS: [&str; 5] = ["create", "attach", "expand", "detach", "delete"];

/// A world of so many VMs, of which VM 101 to 103 are nodes.
pub fn world_of(vms: u32) -> World {
    let mut world = World::builtin();
    for vm in &mut world.vms {
        vm.guest = world::Guest::Memory;
    }
    for (id, kind) in
        [("thin", world::Kind::Lvmthin), ("tank", world::Kind::Zfspool), ("ceph", world::Kind::Rbd)]
    {
        let shared = kind == world::Kind::Rbd;
        let storage = world::Storage { id: id.to_owned(), kind, shared, ..world.storages[1].clone() };
        world.storages.push(storage);
    }
    let first = world.vms.first().expect("the world has VMs").clone();
    for vmid in 104..(101 + vms) {
        let node = if vmid % 2 == 0 { "pve1" } else { "pve2" };
        world.vms.push(world::Vm {
            vmid,
            node: node.to_owned(),
            name: format!("other-{vmid}"),
            ..first.clone()
        });
    }
    world
}

/// The counts of one volume's life on a storage: at the first touch of everything, and in the steady state, where the largest of several
/// lives counts.
pub async fn lives(
    vms: u32,
    storage: &str,
) -> (BTreeMap<&'static str, Count>, BTreeMap<&'static str, Count>) {
    let world = world_of(vms);
    let secret = world.token(CSI).expect("the token").secret.clone();
    let options = Options { time: Profile::Recorded, ..Options::default() };
    let sim = Sim::start(world, options).expect("the world can be made");
    let bench = Bench::over(&sim, &Token { id: CSI.to_owned(), secret });
    let cold = life(&bench, storage, "pvc-cold").await;
    // Tasks are awaited at the pace that they were found to have.
    for round in 0..5 {
        life(&bench, storage, &format!("pvc-warm-{round}")).await;
    }
    let mut steady: BTreeMap<&'static str, Count> = BTreeMap::new();
    for round in 0..10 {
        for (operation, count) in life(&bench, storage, &format!("pvc-{round}")).await {
            let most = steady.entry(operation).or_default();
            if count.own >= most.own {
                *most = count;
            }
        }
    }
    (cold, steady)
}

async fn life(bench: &Bench, storage: &str, name: &str) -> BTreeMap<&'static str, Count> {
    let mut counts = BTreeMap::new();
    let mut began = Instant::now();
    bench.sim.clear_log();
    let mut note = |operation: &'static str| {
        let log = bench.sim.log();
        let shared = log.iter().filter(|entry| is_shared(&entry.method, &entry.path, operation)).count();
        counts.insert(operation, Count { own: log.len() - shared, shared, ms: began.elapsed().as_millis() });
        bench.sim.clear_log();
        began = Instant::now();
    };
    let volume = bench.create(new_volume(name, storage)).await.expect("a volume").volume_id;
    note("create");
    bench.attach(&volume, "worker-101").await.expect("attached");
    note("attach");
    bench.expand(&volume, 2 * GIB).await.expect("expanded");
    note("expand");
    bench.detach(&volume, "worker-101").await.expect("detached");
    note("detach");
    bench.delete(&volume).await.expect("deleted");
    note("delete");
    counts
}

/// Whether a request is one of a sweep or a poll: a look at the region, or at a VM that the operation is not about.
fn is_shared(method: &str, path: &str, operation: &str) -> bool {
    let of_vm = path.contains("/qemu/");
    let of_other = of_vm && (!path.contains("/qemu/101/") || operation == "delete");
    method == "GET"
        && (path.contains("/cluster/resources") || path.contains("/access/permissions") || of_other)
}

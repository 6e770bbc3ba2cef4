//! The rights that the document on tenants gives to a tenant's token, read out of the document and tried in the simulator.

use proxmox_csi::{
    pve::client::Token,
    sim::{Sim, World, world::Token as WorldToken},
};
use tonic::Code;

use crate::{
    helm::path,
    support::{Bench, GIB, new_volume},
};

/// The world after the `pveum` lines of the document, with its storage `ceph` for our `shared`.
fn world() -> World {
    let text = std::fs::read_to_string(path("docs/helm.md")).expect("the document");
    let section = text.split("\n## Tenants").nth(1).expect("a section on tenants");
    let mut world = World::builtin();
    let mut lines = 0;
    for line in section.lines().filter(|line| line.starts_with("pveum ")) {
        let line = line.split(" #").next().expect("a command");
        let mut quoted = line.split('"');
        let words: Vec<&str> = quoted.next().expect("words").split_whitespace().skip(1).collect();
        let privileges = quoted.next().unwrap_or_default();
        match words[..] {
            ["pool", "add", pool] => drop(world.pools.insert(pool.to_owned())),
            ["user", "add", _] => {}
            ["user", "token", "add", user, name, "-privsep", "0"] => {
                let id = format!("{user}!{name}");
                world.tokens.push(WorldToken { id, secret: "tenant".to_owned(), privsep: false });
            }
            ["role", "add", role, "--privs"] => {
                let privileges = privileges.split_whitespace().map(str::to_owned).collect();
                world.roles.insert(role.to_owned(), privileges);
            }
            ["acl", "modify", path, "--users", who, "--roles", role] => {
                let mut entry = world.acl[0].clone();
                entry.path = path.replace("/storage/ceph", "/storage/shared");
                (entry.who, entry.role, entry.propagate) = (who.to_owned(), role.to_owned(), true);
                world.acl.push(entry);
            }
            _ => panic!("not understood: {line}"),
        }
        lines += 1;
    }
    assert_eq!(lines, 8, "lines of pveum in the document");
    // The tenant's VM is in its pool, and another tenant's is not.
    world.vms.iter_mut().find(|vm| vm.vmid == 101).expect("VM 101").pool = Some("acme".to_owned());
    world
}

#[tokio::test(start_paused = true)]
async fn a_tenants_token_has_the_rights_of_the_document_and_no_more_are_needed() {
    let sim = Sim::in_memory(world()).expect("the world can be made");
    let token = Token { id: "acme@pve!csi".to_owned(), secret: "tenant".to_owned() };
    let bench = Bench::over(&sim, &token);
    let volume = bench.create(new_volume("pvc-1", "shared")).await.expect("created").volume_id;
    bench.attach(&volume, "worker-101").await.expect("attached");
    bench.expand(&volume, 2 * GIB).await.expect("grown");
    bench.detach(&volume, "worker-101").await.expect("detached");
    // The VM of another tenant, and a storage that is not this one's.
    let refused = bench.attach(&volume, "worker-102").await.expect_err("another tenant's VM");
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
    bench.create(new_volume("pvc-2", "local")).await.expect_err("another storage");
    bench.delete(&volume).await.expect("deleted");
}

//! Storages: there, switched on, available where they are used, of a type that is served. And the classes that name them.

use std::collections::BTreeSet;

use super::{Code, Finding, RegionView, Report, View, joined, note};
use crate::{
    k8s::inventory::{ClassObject, Inventory},
    pve::{
        cluster::{Resources, StorageRow},
        inventory::StorageConfig,
    },
    types::{NodeName, StorageId, params::Parameters},
    volume::attach::ZEROED,
};

/// A storage with less of its space left than one part of this many is told of.
const LEAST_FREE: u64 = 10;

pub(super) fn check(view: &View, region: &RegionView, resources: &Resources, report: &mut Report) {
    let area = region.area();
    let used = view.used_storages(region);
    if let Err(why) = &region.storages {
        report.unseen(&area, format!("how storages are configured: {why}"));
    }
    if used.is_empty() {
        report.unseen(&area, "storages: none is used, and none is seen that takes images");
        return;
    }
    let before = report.findings.len();
    for storage in &used {
        let config =
            region.storages.as_ref().ok().and_then(|all| all.iter().find(|one| one.storage == *storage));
        let rows: Vec<&StorageRow> = resources.storage(storage).collect();
        if config.is_none() && rows.is_empty() {
            // A storage of a class belongs to one of several regions, and nobody says to which.
            let elsewhere = view.regions.iter().any(|other| other.is_shared(storage).is_some());
            if !elsewhere {
                let seen: BTreeSet<&str> =
                    resources.storages.iter().map(|row| row.storage.as_str()).collect();
                let text = format!("no storage `{storage}` is seen (seen: {})", joined(seen));
                report.find(
                    Finding::new(Code::StorageNotFound, &area, storage.as_str(), text)
                        .hint("the name is another, or the token lacks Datastore.Audit on it")
                        .command("pvesm status"),
                );
            }
            continue;
        }
        one(view, region, resources, storage, config, &rows, report);
    }
    report.pass_unless_found(before, &area, format!("storage {}: there, on, and available", joined(&used)));
}

fn one(
    view: &View,
    region: &RegionView,
    resources: &Resources,
    storage: &StorageId,
    config: Option<&StorageConfig>,
    rows: &[&StorageRow],
    report: &mut Report,
) {
    let area = region.area();
    let find = |code, text: String| Finding::new(code, &area, storage.as_str(), text);
    if config.is_some_and(|config| config.disabled) {
        let text = format!("storage `{storage}` is disabled");
        report.find(find(Code::StorageDisabled, text).command(format!("pvesm set {storage} --disable 0")));
        return;
    }
    if let Some(config) = config.filter(|config| !config.takes_images()) {
        let text = format!("storage `{storage}` takes {}, and no images", config.content.join(", "));
        let mut content = config.content.clone();
        content.insert(0, "images".to_owned());
        report.find(
            find(Code::StorageContent, text)
                .hint("a VM with a volume of it plugged in does not start")
                .command(format!("pvesm set {storage} --content {}", content.join(","))),
        );
    }
    let states = region.states.iter().filter(|(id, ..)| id == storage);
    let is_down = |node: &NodeName| {
        let mut states = states.clone().filter(|(_, on, _)| on == node);
        states.any(|(.., state)| state.as_ref().is_ok_and(|state| !state.active))
    };
    let down: Vec<&NodeName> = rows
        .iter()
        .filter(|row| resources.is_online(&row.node) && (!row.available || is_down(&row.node)))
        .map(|row| &row.node)
        .collect();
    for (_, node, state) in states.clone() {
        if let Err(why) = state {
            report.unseen(&area, format!("whether storage `{storage}` is active on `{node}`: {why}"));
        }
    }
    if !down.is_empty() {
        let text = format!("storage `{storage}` is not available on {}", joined(&down));
        report.find(
            find(Code::StorageInactive, text)
                .hint("it is not mounted, not imported or not connected there")
                .command(format!("pvesm status --storage {storage}   # on {}", joined(&down))),
        );
    }
    let plugin = rows.first().map_or_else(|| config.map_or("", |config| &config.plugin), |row| &row.plugin);
    if plugin == "lvm" {
        let text =
            format!("storage `{storage}` is thick LVM, which hands out blocks with what they held before");
        report.find(
            find(Code::StorageThickLvm, text)
                .hint("volumes that are there attach and are mounted if they hold a file system; new ones are refused. Take lvmthin, zfspool, rbd or a directory"),
        );
    } else if !ZEROED.contains(&plugin) {
        let text = format!(
            "storage `{storage}` is of type `{plugin}`, of which it is not known that new volumes are blank"
        );
        report.find(find(Code::StorageUnknownType, text).hint(
            "volumes are made and attached there, and never formatted: make the file system once by hand",
        ));
    }
    for row in space(rows) {
        if row.total.get() > 0 && row.free().get() < row.total.get() / LEAST_FREE {
            let text = format!(
                "storage `{storage}` on {} has {} of {} left",
                row.node,
                approximate(row.free().get()),
                approximate(row.total.get())
            );
            report.find(
                find(Code::StorageFull, text).hint("thin volumes that are full fail writes in the guest"),
            );
        }
    }
    if let Some(config) = config.filter(|config| vanishes(config)) {
        let text = format!(
            "storage `{storage}` is a plain directory at {}; where that is a mount, nobody notices when it is not mounted",
            config.path.as_deref().unwrap_or("its path")
        );
        report.find(
            find(Code::StorageUnproven, text)
                .hint("the driver takes an empty listing of it for no proof that a volume is gone")
                .command(format!("pvesm set {storage} --is_mountpoint 1   # only if it is one")),
        );
    }
    let workers: BTreeSet<&NodeName> =
        view.nodes.iter().flat_map(|node| view.vms_of(node)).map(|(_, vm, _)| &vm.row.node).collect();
    let lacking: Vec<&&NodeName> = workers
        .iter()
        .filter(|node| {
            region.vms.values().any(|vm| vm.row.node == ***node)
                && !rows.iter().any(|row| row.node == ***node)
        })
        .collect();
    if !lacking.is_empty() && !rows.is_empty() {
        let text = format!("storage `{storage}` is not on {}, where workers run", joined(&lacking));
        report.find(
            find(Code::StorageNodes, text)
                .hint("pods that use it are scheduled elsewhere, if its StorageClass binds late"),
        );
    }
}

/// One row for a shared storage, each for a local one.
fn space<'a>(rows: &[&'a StorageRow]) -> Vec<&'a StorageRow> {
    let shared = rows.first().is_some_and(|row| row.shared);
    let available = rows.iter().copied().filter(|row| row.available);
    if shared { available.take(1).collect() } else { available.collect() }
}

/// Whether a storage is a directory that Proxmox makes anew where its path has vanished. The one that every installation has is not.
fn vanishes(config: &StorageConfig) -> bool {
    config.plugin == "dir"
        && !config.is_mountpoint
        && config.path.as_deref().is_some_and(|path| !path.starts_with("/var/lib/vz"))
}

/// A size with one decimal, for people.
fn approximate(bytes: u64) -> String {
    let mut unit = 0;
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut tenths = u128::from(bytes) * 10;
    while tenths >= 10_240 && unit + 1 < units.len() {
        tenths /= 1024;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} bytes")
    } else {
        format!("{}.{} {}", tenths / 10, tenths % 10, units[unit])
    }
}

/// The StorageClasses of the driver.
pub(super) fn classes(view: &View, cluster: &Inventory, report: &mut Report) {
    let area = "kubernetes";
    let Ok(classes) = &cluster.classes else { return };
    if classes.is_empty() {
        report.unseen(area, format!("StorageClasses: none has the provisioner {}", view.settings.driver));
        return;
    }
    let before = report.findings.len();
    for class in classes {
        class_parameters(class, report);
        let Some(storage) = class.parameters.get("storage").and_then(|id| id.parse::<StorageId>().ok())
        else {
            continue;
        };
        let local = view.regions.iter().any(|region| region.is_shared(&storage) == Some(false));
        if local && class.immediate {
            let text = format!(
                "StorageClass `{}` binds at once, and storage `{storage}` is local to each Proxmox node",
                class.name
            );
            report.find(
                Finding::new(Code::ClassBinding, area, &class.name, text)
                    .hint("a volume may come to be where no pod can run: a class can't be changed, so make one anew with `volumeBindingMode: WaitForFirstConsumer`"),
            );
        }
    }
    report.pass_unless_found(
        before,
        area,
        format!("StorageClass {}", joined(classes.iter().map(|class| &class.name))),
    );
}

fn class_parameters(class: &ClassObject, report: &mut Report) {
    let find = |text: String| Finding::new(Code::ClassParameter, "kubernetes", &class.name, text);
    match Parameters::of_new_volume(&class.parameters) {
        Err(error) => report.find(
            find(format!("StorageClass `{}`: {error}", class.name)).hint("no volume can be made of it"),
        ),
        Ok((parameters, warnings)) => {
            for warning in warnings {
                report.find(note(find(format!("StorageClass `{}`: {warning}", class.name))));
            }
            if parameters.storage.is_none() {
                report.find(
                    find(format!("StorageClass `{}` names no storage", class.name))
                        .hint("no volume can be made of it: set the parameter `storage`"),
                );
            }
            if parameters.replicate {
                report.find(
                    find(format!(
                        "StorageClass `{}` asks for replication, which this driver does not do",
                        class.name
                    ))
                    .hint("no volume can be made of it; those that are there are served"),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people_have_one_decimal() {
        for (bytes, expected) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1 << 10, "1.0 KiB"),
            (1_610_612_736, "1.5 GiB"),
            (u64::MAX, "16383.9 PiB"),
        ] {
            assert_eq!(approximate(bytes), expected);
        }
    }
}

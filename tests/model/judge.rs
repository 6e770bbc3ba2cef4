//! Judges each request of a controller that changes something, at the moment it goes out, by what is true in Proxmox then.
//!
//! A write whose digest is not that of the config is refused by Proxmox, and judged no further.

use std::{collections::BTreeMap, time::Duration};

use proxmox_csi::{pve::transport::HttpRequest, sim::rules::drive::Drive};
use tokio::time::Instant;

use crate::{
    holds::{Where, volid, wwn},
    plan::Kind,
    rig::Rig,
    support::settings,
};

/// How old what the driver goes by may be where a volume is local (`volume/sweep.rs:RECENT`, and a poll).
const RECENT: Duration = Duration::from_secs(75);
/// How long a drive that only QEMU knows may go unnoticed in a VM that no operation was about (`volume/sweep.rs:STATUS_AGE`).
const UNNOTICED: Duration = Duration::from_mins(11);
/// The name of every holder VM.
const NAME: &str = "csi-holder";

fn decoded(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn segments(request: &HttpRequest) -> Vec<String> {
    let path = request.uri().path();
    path.strip_prefix("/api2/json/").unwrap_or(path).split('/').map(decoded).collect()
}

fn form(request: &HttpRequest) -> BTreeMap<String, String> {
    let text = String::from_utf8_lossy(request.body()).into_owned();
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (decoded(key), decoded(value))).collect()
}

/// The VM that a request is about.
pub fn vm_of(request: &HttpRequest) -> Option<u32> {
    let segments = segments(request);
    match segments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["nodes", _, "qemu", vmid, ..] => vmid.parse().ok(),
        _ => None,
    }
}

/// Judges a request of a controller.
pub fn write(rig: &Rig, controller: u32, request: &HttpRequest) {
    let judge = Judge { rig, controller };
    judge.one_controller_acts();
    let (segments, form) = (segments(request), form(request));
    let parts: Vec<&str> = segments.iter().map(String::as_str).collect();
    let verdict = match (request.method().as_str(), parts.as_slice()) {
        ("POST", ["nodes", node, "qemu", vmid, "config"]) => {
            judge.writes_touch_only_what_is_ours(node, number(vmid), &form)
        }
        ("PUT", ["nodes", node, "qemu", vmid, "resize"]) => judge.resize(node, number(vmid), &form),
        ("POST", ["nodes", _, "qemu"]) => make_vm(&form),
        ("DELETE", ["nodes", _, "qemu", vmid]) => judge.destroy_vm(number(vmid)),
        ("POST", ["nodes", node, "storage", storage, "content"]) => judge.allocate(node, storage, &form),
        ("DELETE", ["nodes", node, "storage", _, "content", volid]) => {
            judge.a_volume_in_use_is_not_deleted(node, volid)
        }
        (method, _) => Err(("a_write_is_one_that_is_known", format!("{method} {}", request.uri()))),
    };
    if let Err((invariant, text)) = verdict {
        rig.ledger().wrong(invariant, format!("c{controller}: {text}"));
    }
}

fn number(text: &str) -> u32 {
    text.parse().unwrap_or_default()
}

type Verdict = Result<(), (&'static str, String)>;

struct Judge<'a> {
    rig: &'a Rig,
    controller: u32,
}

impl Judge<'_> {
    /// Only one controller acts, and it holds the lease: P1.
    fn one_controller_acts(&self) {
        let acting = self.rig.acting();
        if acting != [self.controller] {
            let text = format!("c{} writes while {acting:?} may act", self.controller);
            self.rig.ledger().wrong("one_controller_acts", text);
        }
    }

    fn is_holder(&self, vmid: u32) -> bool {
        settings().holders.contains(&vmid)
            && self.rig.sim.vm(vmid).is_none_or(|vm| vm.current("name") == Some(NAME))
    }

    /// Whether the controller may be at work on such a call.
    fn is_asked(&self, is_it: impl Fn(Kind, usize, u32) -> bool) -> bool {
        let ledger = self.rig.ledger();
        ledger.at_work(self.controller).any(|asked| is_it(asked.kind, asked.volume, asked.vm))
    }

    /// A config write carries the digest that was read, one volume, and changes only what is ours: P7.
    fn writes_touch_only_what_is_ours(
        &self,
        node: &str,
        vmid: u32,
        form: &BTreeMap<String, String>,
    ) -> Verdict {
        let broken = |text: String| Err(("writes_touch_only_what_is_ours", text));
        let Some(digest) = form.get("digest") else {
            return broken(format!("a config write of VM {vmid} without a digest"));
        };
        let Some(vm) = self.rig.sim.vm(vmid).filter(|vm| vm.node == node) else { return Ok(()) };
        if vm.conf.digest() != *digest {
            return Ok(());
        }
        self.rig.ledger().written.insert((self.controller, vmid));
        let keys: Vec<&String> = form.keys().filter(|key| *key != "digest").collect();
        let [key] = keys.as_slice() else { return broken(format!("several keys in one call: {form:?}")) };
        if let Some(slot) = form.get("delete") {
            return self.a_disk_is_taken_out_only_where_it_was_asked_for(vmid, &vm, slot);
        }
        if let Some(slot) = form.get("revert") {
            let ours = vm.pending(slot).map_or(Some(true), |text| {
                let drive = Drive::stored(slot, text)?;
                Some(self.rig.volume_of(&vm.node, &drive.file).is_some())
            });
            let deletes_ours = vm.is_pending_delete(slot)
                && vm.current(slot).is_some_and(|text| {
                    Drive::stored(slot, text)
                        .is_some_and(|drive| self.rig.volume_of(&vm.node, &drive.file).is_some())
                });
            if ours == Some(true) && (deletes_ours || !vm.is_pending_delete(slot)) {
                return Ok(());
            }
            return broken(format!("takes back what others left pending in {slot} of VM {vmid}"));
        }
        let Some(drive) = Drive::stored(key, &form[*key]) else {
            return broken(format!("sets {key} of VM {vmid} to {}", form[*key]));
        };
        let Some(volume) = self.rig.volume_of(&vm.node, &drive.file) else {
            return broken(format!("plugs `{}`, which is not ours, into VM {vmid}", drive.file));
        };
        for (what, text) in [("has", vm.current(key)), ("is to have", vm.pending(key))] {
            let other = text.filter(|text| {
                Drive::stored(key, text).is_none_or(|old| old.file != drive.file || old.is_cdrom())
            });
            if let Some(other) = other {
                return broken(format!(
                    "{key} of VM {vmid} {what} `{other}`, and would get `{}`",
                    drive.file
                ));
            }
        }
        let tunes = vm.current(key).is_some();
        if !tunes && !self.is_holder(vmid) && !self.rig.is_its_node(vmid) {
            let touched = self.rig.ledger().touches.iter().any(|touch| {
                touch.vm == Some(vmid) && touch.to.is_none_or(|to| to.elapsed() < Duration::from_mins(1))
            });
            if !touched {
                return broken(format!("VM {vmid} is not the one that worker-{vmid} runs in"));
            }
        }
        if self.is_holder(vmid) {
            if !self.is_asked(|kind, of, _| matches!(kind, Kind::Expand(_)) && of == volume) {
                return broken(format!("plugs pvc-{volume} into a holder, and nobody asked for it"));
            }
        } else {
            let asked = self.is_asked(|kind, of, at| {
                let plugs = matches!(kind, Kind::Publish | Kind::PublishReadOnly | Kind::Unpublish);
                of == volume
                    && ((plugs && at == vmid) || matches!(kind, Kind::Modify(_) | Kind::UnpublishAll))
            });
            if !asked {
                return broken(format!("plugs pvc-{volume} into VM {vmid}, and nobody asked for it"));
            }
            let named = wwn(&self.rig.setup.volumes[volume]);
            if !tunes && drive.options.get("wwn") != Some(&named) {
                return Err(("a_disk_answers_with_its_volumes_own_name", format!("{form:?}, not {named}")));
            }
        }
        if tunes {
            Ok(())
        } else {
            self.a_volume_that_another_vm_has_is_not_plugged_in(vmid, volume, drive.flag("ro"))
        }
    }

    /// A volume is plugged in only where no other VM has it: P1.
    fn a_volume_that_another_vm_has_is_not_plugged_in(
        &self,
        vmid: u32,
        volume: usize,
        read_only: bool,
    ) -> Verdict {
        let spec = &self.rig.setup.volumes[volume];
        let others = self.rig.holds().into_iter().filter(|hold| {
            hold.volume == volume && hold.vm != vmid && !(read_only && hold.read_only && spec.many)
        });
        let ledger = self.rig.ledger();
        let kinds = [Kind::Publish, Kind::PublishReadOnly, Kind::UnpublishAll, Kind::Unpublish];
        let mut begun: Vec<Instant> = kinds
            .iter()
            .filter_map(|kind| ledger.at_work_since(self.controller, *kind, volume, vmid))
            .collect();
        begun.extend(
            ledger
                .at_work(self.controller)
                .filter(|asked| asked.volume == volume && matches!(asked.kind, Kind::Expand(_)))
                .map(|asked| asked.begun),
        );
        let begun = begun.into_iter().min().unwrap_or_else(Instant::now);
        for hold in others {
            // What others did while the driver was at it, no look could have shown.
            let excused = ledger.by_hand.get(&(volume, hold.vm)).is_some_and(|since| {
                let age = if spec.key.node.is_some() { RECENT } else { Duration::ZERO };
                let known = ledger.written.contains(&(self.controller, hold.vm));
                let age = if hold.at == Where::Qemu && !known { UNNOTICED } else { age };
                since.is_none_or(|since| since + age >= begun)
            });
            if !excused {
                let text = format!(
                    "pvc-{volume} is plugged into VM {vmid} while VM {} has it: {} {:?}",
                    hold.vm, hold.slot, hold.at
                );
                return Err(("a_volume_that_another_vm_has_is_not_plugged_in", text));
            }
        }
        Ok(())
    }

    /// A drive is taken out only where it is the volume's that somebody asked to be taken out there: P2, P7.
    fn a_disk_is_taken_out_only_where_it_was_asked_for(
        &self,
        vmid: u32,
        vm: &proxmox_csi::sim::VmView,
        slot: &str,
    ) -> Verdict {
        let broken = |text: String| Err(("writes_touch_only_what_is_ours", text));
        let text = vm.current(slot).or_else(|| vm.pending(slot));
        let Some(text) = text else { return Ok(()) };
        let file = text.split(',').next().unwrap_or_default();
        let Some(volume) = self.rig.volume_of(&vm.node, file) else {
            // A failover moved the config, not the disk: the drive says that it is the volume's by its name.
            let moved = self.rig.setup.volumes.iter().position(|spec| {
                volid(spec) == file
                    && Drive::stored(slot, text).is_some_and(|d| d.options.get("wwn") == Some(&wwn(spec)))
            });
            return match moved {
                Some(_) => Ok(()),
                None => broken(format!("takes {slot} of VM {vmid} out, which is `{text}`")),
            };
        };
        let there = self.rig.is_its_node(vmid);
        let asked = self.is_asked(|kind, of, at| {
            of == volume
                && match kind {
                    Kind::Unpublish => at == vmid || !there,
                    Kind::UnpublishAll => true,
                    Kind::Publish | Kind::PublishReadOnly => at == vmid || self.is_holder(vmid),
                    Kind::Expand(_) => self.is_holder(vmid),
                    Kind::Delete => self.is_holder(vmid) || slot.starts_with("unused"),
                    _ => false,
                }
        });
        if asked {
            return Ok(());
        }
        Err((
            "a_disk_is_taken_out_only_where_it_was_asked_for",
            format!("{slot} of VM {vmid}, which is pvc-{volume}"),
        ))
    }

    /// A drive grows that is ours, and that somebody asked to grow.
    fn resize(&self, node: &str, vmid: u32, form: &BTreeMap<String, String>) -> Verdict {
        let broken = |text: String| Err(("writes_touch_only_what_is_ours", text));
        let Some(digest) = form.get("digest") else { return broken(format!("no digest: {form:?}")) };
        let Some(vm) = self.rig.sim.vm(vmid).filter(|vm| vm.node == node) else { return Ok(()) };
        if vm.conf.digest() != *digest {
            return Ok(());
        }
        let slot = form.get("disk").map(String::as_str).unwrap_or_default();
        let file = vm.current(slot).and_then(|text| text.split(',').next()).unwrap_or_default();
        match self.rig.volume_of(&vm.node, file) {
            Some(volume) if self.is_asked(|k, of, _| matches!(k, Kind::Expand(_)) && of == volume) => Ok(()),
            _ => broken(format!("grows {slot} of VM {vmid}: {form:?}")),
        }
    }

    /// Only a holder is destroyed, and only an empty one: P7.
    fn destroy_vm(&self, vmid: u32) -> Verdict {
        let Some(vm) = self.rig.sim.vm(vmid) else { return Ok(()) };
        let empty = vm.conf.current.keys().all(|key| !key.starts_with("scsi") || key == "scsihw");
        if self.is_holder(vmid) && empty && !vm.running {
            return Ok(());
        }
        Err(("writes_touch_only_what_is_ours", format!("destroys VM {vmid}: {:?}", vm.conf.current)))
    }

    /// A volume is allocated only where it was asked for.
    fn allocate(&self, node: &str, storage: &str, form: &BTreeMap<String, String>) -> Verdict {
        let filename = form.get("filename").map(String::as_str).unwrap_or_default();
        let wanted = self.rig.setup.volumes.iter().position(|spec| {
            spec.key.storage == storage
                && spec.key.node.as_deref().is_none_or(|of| of == node)
                && spec.key.name.rsplit('/').next() == Some(filename)
        });
        let owner = form.get("vmid").map(String::as_str) == Some("9999");
        match wanted {
            Some(volume) if owner && self.is_asked(|kind, of, _| kind == Kind::Create && of == volume) => {
                Ok(())
            }
            _ => {
                Err(("writes_touch_only_what_is_ours", format!("allocates {form:?} on {storage} of {node}")))
            }
        }
    }

    /// A volume is deleted only when it was asked for, and when no VM and no snapshot has it: P7.
    fn a_volume_in_use_is_not_deleted(&self, node: &str, volid: &str) -> Verdict {
        let Some(volume) = self.rig.volume_of(node, volid) else {
            return Err(("writes_touch_only_what_is_ours", format!("deletes `{volid}` on {node}")));
        };
        let ledger = self.rig.ledger();
        let Some(begun) = ledger
            .at_work(self.controller)
            .filter(|asked| asked.kind == Kind::Delete && asked.volume == volume)
            .map(|asked| asked.begun)
            .min()
        else {
            return Err(("writes_touch_only_what_is_ours", format!("deletes pvc-{volume}, unasked")));
        };
        drop(ledger);
        let (holds, snapshots) = (self.rig.holds(), self.rig.snapshots_with(volume));
        let ledger = self.rig.ledger();
        let excused = |vm: u32, at: Option<Where>| {
            let known = ledger.written.contains(&(self.controller, vm));
            let age = if at == Some(Where::Qemu) && !known { UNNOTICED } else { Duration::ZERO };
            let by_hand = ledger.by_hand.get(&(volume, vm));
            by_hand.is_some_and(|since| since.is_none_or(|since| since + age >= begun))
        };
        let users = holds.iter().filter(|hold| hold.volume == volume && !excused(hold.vm, Some(hold.at)));
        if let Some(hold) = users.into_iter().next() {
            let text = format!("pvc-{volume}, which VM {} has: {} {:?}", hold.vm, hold.slot, hold.at);
            return Err(("a_volume_in_use_is_not_deleted", text));
        }
        let fresh = |vm: u32| ledger.is_touched(begun, Some(vm), volume);
        match snapshots.iter().find(|(vm, _)| !fresh(*vm)) {
            Some((vm, name)) => {
                Err(("a_volume_in_use_is_not_deleted", format!("pvc-{volume}, snapshot {name} of VM {vm}")))
            }
            None => Ok(()),
        }
    }
}

/// A VM is made only as a holder.
fn make_vm(form: &BTreeMap<String, String>) -> Verdict {
    let vmid = form.get("vmid").map_or(0, |text| number(text));
    let is_holder = settings().holders.contains(&vmid) && form.get("name").map(String::as_str) == Some(NAME);
    if is_holder { Ok(()) } else { Err(("writes_touch_only_what_is_ours", format!("makes {form:?}"))) }
}

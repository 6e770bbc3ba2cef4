//! LUKS by cryptsetup(8). The passphrase goes to its standard input and nowhere else; the disk it finds among our descriptors.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};

use super::{
    LinuxHost, POLL,
    device::Device,
    device_of,
    disks::{self, Tree},
    exec::{Output, Tool},
    fs, held_by, mountinfo,
};
use crate::host::{
    Answer, Disk, Format, Found, OpenDisk,
    error::{DisksError, FormatError, OpenError, PathError, ToolError},
    guard,
    luks::{GrowMappingError, KeyCost, LockError, Luks, Mapping, Passphrase, Pbkdf, SUBSYSTEM, UnlockError},
};

/// What cryptsetup ends with where no key slot opens with the passphrase (cryptsetup(8), return codes).
const BAD_PASSPHRASE: i32 = 2;
/// Growing a mapping is a reload of its table.
const GROW_DEADLINE: Duration = Duration::from_mins(2);

/// cryptsetup with these arguments. It makes the nodes below `/dev/mapper` itself: from within a container it would wait for ever for
/// the host's udev to report that it has (libdevmapper, `DM_DISABLE_UDEV`).
fn cryptsetup(args: Vec<String>) -> Tool {
    Tool::new("cryptsetup", args).with("DM_DISABLE_UDEV", "1")
}

/// Nothing here is secret, and nothing here forces anything: `--batch-mode` leaves out the question that only a terminal is asked, and
/// the proof that the disk is blank has come before.
fn format_arguments(cost: &KeyCost, disk: &Path) -> Vec<String> {
    let fixed = ["luksFormat", "--batch-mode", "--type", "luks2", "--subsystem", SUBSYSTEM];
    let mut args: Vec<String> = fixed.map(str::to_owned).into();
    let mut add = |flag: &str, value: String| args.extend([flag.to_owned(), value]);
    add("--pbkdf", cost.pbkdf.as_str().to_owned());
    if cost.pbkdf == Pbkdf::Argon2id {
        add("--pbkdf-memory", cost.memory_kib.to_string());
    }
    match cost.iterations {
        Some(iterations) => add("--pbkdf-force-iterations", iterations.to_string()),
        None => add("--iter-time", cost.time_ms.to_string()),
    }
    add("--key-file", "-".to_owned());
    args.push(disk.display().to_string());
    args
}

/// `--disable-keyring`: a key in the kernel's keyring is out of reach in many containers, and a mapping that has it there grows only with
/// the passphrase, which an expansion does not bring along by default.
fn open_arguments(disk: &Path, readonly: bool, name: &str) -> Vec<String> {
    let mut args: Vec<String> = ["open", "--type", "luks", "--disable-keyring"].map(str::to_owned).into();
    if readonly {
        args.push("--readonly".to_owned());
    }
    args.extend(["--key-file", "-"].map(str::to_owned));
    args.extend([disk.display().to_string(), name.to_owned()]);
    args
}

fn path_of(device: &Device) -> Result<std::path::PathBuf, ToolError> {
    device.path_for_children().map_err(|source| ToolError::Run { tool: "cryptsetup", source })
}

impl Tree {
    /// The opened LUKS volumes: devices of device mapper whose uuid says so (`lib/libdevmapper.c` of cryptsetup, `dm_prepare_uuid`).
    fn mappings(&self) -> Result<Vec<Mapping>, DisksError> {
        let mut mappings = Vec::new();
        for name in self.names()? {
            if name.starts_with("dm-") {
                mappings.extend(self.mapping(&name)?);
            }
        }
        Ok(mappings)
    }

    fn mapping(&self, name: &str) -> Result<Option<Mapping>, PathError> {
        let dm = self.block(name).join("dm");
        let (Some(own), Some(uuid)) = (disks::read(&dm.join("name"))?, disks::read(&dm.join("uuid"))?) else {
            return Ok(None);
        };
        let Some((number, size, readonly)) = self.numbers(name)? else { return Ok(None) };
        if !uuid.starts_with("CRYPT-LUKS") {
            return Ok(None);
        }
        let device =
            Disk { name: name.to_owned(), number, wwn: None, lun: None, size, readonly, virtio: false };
        Ok(Some(Mapping { name: own, over: self.slave(name)?, device }))
    }

    fn open_mapping(&self, mapping: &Mapping) -> Result<Device, OpenError> {
        let name = &mapping.device.name;
        let device = self.open_node(&mapping.device)?;
        // From here on the number can't become another device's.
        let fail = |source| OpenError::Io { name: name.clone(), source };
        match self.mapping(name).map_err(fail)? {
            Some(now) if now.name == mapping.name && now.device.number == mapping.device.number => Ok(device),
            _ => Err(OpenError::Changed { name: name.clone(), listed: None, answered: None }),
        }
    }
}

impl LinuxHost {
    async fn encrypt(&self, disk: &OpenDisk, key: &Passphrase, cost: &KeyCost) -> Result<(), FormatError> {
        let (name, device) = (&disk.disk().name, device_of(disk));
        fs::prove_blank(&self.tools, name, &device).await?;
        let failed = |source| FormatError::Encrypt { name: name.clone(), source };
        let path = path_of(&device).map_err(failed)?;
        tracing::info!(disk = name, "encrypting a blank disk");
        // No deadline: a disk with half a header would never be encrypted again.
        let tool = cryptsetup(format_arguments(cost, &path)).told(key.clone());
        self.tools.run(tool).await.and_then(Output::success).map_err(failed)?;
        match fs::probe(&self.tools, name, &device).await? {
            Found::Luks { ours: true } => Ok(()),
            found => Err(FormatError::NotEncrypted { name: name.clone(), found: guard::describe(&found) }),
        }
    }

    async fn open_encrypted(
        &self,
        disk: &OpenDisk,
        key: &Passphrase,
        name: &str,
    ) -> Result<Mapping, UnlockError> {
        let (listed, device) = (disk.disk(), device_of(disk));
        let failed = |source| UnlockError::Tool { name: listed.name.clone(), source };
        let path = path_of(&device).map_err(failed)?;
        let tool = cryptsetup(open_arguments(&path, listed.readonly, name)).told(key.clone());
        let output = self.tools.run(tool).await.map_err(failed)?;
        if output.code == Some(BAD_PASSPHRASE) {
            return Err(UnlockError::WrongPassphrase { name: listed.name.clone() });
        }
        output.success().map_err(failed)?;
        let opened = self.mappings().await?.into_iter();
        let mut opened = opened.filter(|mapping| mapping.name == name && mapping.over == Some(listed.number));
        let vanished = || UnlockError::Vanished { name: listed.name.clone(), mapping: name.to_owned() };
        opened.next().ok_or_else(vanished)
    }

    /// Waits until nothing but us holds the mapping, and writes it out.
    async fn flush_mapping(&self, mapping: &Mapping, device: Arc<Device>) -> Result<(), LockError> {
        let name = || mapping.name.clone();
        let flush = |source| LockError::Flush { name: name(), source };
        let deadline = Instant::now() + self.options.busy_timeout;
        loop {
            match self.claim(&device).await {
                Ok(_) => break,
                Err(error) if disks::is_gone(&error) => return Ok(()),
                Err(error) if error.kind() != std::io::ErrorKind::ResourceBusy => return Err(flush(error)),
                Err(_) if Instant::now() < deadline => sleep(POLL).await,
                Err(_) => {
                    let number = mapping.device.number;
                    let holders = self.read("look for holders of", device.node(), move || {
                        mountinfo::foreign_holders(number)
                    });
                    let by = held_by(&holders.await.unwrap_or_default());
                    return Err(LockError::Busy { name: name(), after: self.options.busy_timeout, by });
                }
            }
        }
        if mapping.over.is_none() {
            // Its disk is gone, and with it whatever it was not given.
            return Ok(());
        }
        let node = device.node().to_owned();
        let work = move || device.flush();
        let flushed = super::to_its_end("flush", &node, self.options.flush_timeout, work).await;
        flushed.and_then(|flushed| flushed).map_err(flush)
    }

    async fn close(&self, mapping: &Mapping) -> Result<(), LockError> {
        let there = async || {
            let same = |now: &Mapping| now.name == mapping.name && now.device.number == mapping.device.number;
            Ok::<_, DisksError>(self.mappings().await?.iter().any(same))
        };
        if !there().await? {
            return Ok(());
        }
        let open = self.open_mapping(mapping).await?;
        let device = device_of(&open);
        drop(open);
        self.flush_mapping(mapping, device).await?;
        let tool = cryptsetup(["close", mapping.name.as_str()].map(str::to_owned).into());
        let failed = |source| LockError::Tool { name: mapping.name.clone(), source };
        let output = self.tools.run(tool).await.map_err(failed)?;
        if output.code != Some(0) {
            // Somebody else may have closed it.
            return if there().await? { Err(failed(output.failure())) } else { Ok(()) };
        }
        let deadline = Instant::now() + self.options.gone_timeout;
        while there().await? {
            if Instant::now() >= deadline {
                return Err(LockError::Stays { name: mapping.name.clone() });
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    async fn resize(&self, mapping: &Mapping, key: Option<&Passphrase>) -> Result<(), GrowMappingError> {
        let mut args: Vec<String> = ["resize", mapping.name.as_str()].map(str::to_owned).into();
        let tool = match key {
            Some(key) => {
                args.extend(["--key-file", "-"].map(str::to_owned));
                cryptsetup(args).told(key.clone())
            }
            None => cryptsetup(args),
        };
        let name = || mapping.name.clone();
        let output = self.tools.run(tool.within(GROW_DEADLINE)).await;
        let output = output.map_err(|source| GrowMappingError::Tool { name: name(), source })?;
        // Asked for a passphrase, without one to read it says so and ends with 1, or with 2 as for a wrong one.
        let asked = output.code == Some(BAD_PASSPHRASE)
            || (key.is_none() && output.stderr.contains("Nothing to read on input"));
        output.success().map(drop).map_err(|source| {
            if asked {
                GrowMappingError::Passphrase { name: name(), source }
            } else {
                GrowMappingError::Tool { name: name(), source }
            }
        })
    }
}

impl Luks for LinuxHost {
    fn mappings(&self) -> Answer<'_, Vec<Mapping>, DisksError> {
        Box::pin(async { self.on_tree(Tree::mappings).await.map_err(|source| self.sysfs_error(source))? })
    }

    fn encrypt_blank<'a>(
        &'a self,
        disk: &'a OpenDisk,
        key: &'a Passphrase,
        cost: &'a KeyCost,
    ) -> Answer<'a, (), FormatError> {
        Box::pin(self.encrypt(disk, key, cost))
    }

    fn unlock<'a>(
        &'a self,
        disk: &'a OpenDisk,
        key: &'a Passphrase,
        name: &'a str,
    ) -> Answer<'a, Mapping, UnlockError> {
        Box::pin(self.open_encrypted(disk, key, name))
    }

    fn open_mapping<'a>(&'a self, mapping: &'a Mapping) -> Answer<'a, OpenDisk, OpenError> {
        Box::pin(async {
            let (listed, name) = (mapping.clone(), mapping.device.name.clone());
            let opened = self.on_tree(move |tree| tree.open_mapping(&listed)).await;
            let fail = |source| OpenError::Io { name, source: self.sysfs_error(source) };
            Ok(OpenDisk::new(mapping.device.clone(), Arc::new(opened.map_err(fail)??)))
        })
    }

    fn format_inside<'a>(
        &'a self,
        disk: &'a OpenDisk,
        mapping: &'a OpenDisk,
        format: &'a Format,
    ) -> Answer<'a, (), FormatError> {
        Box::pin(async {
            let (under, inside) = (device_of(disk), device_of(mapping));
            let names = (disk.disk().name.as_str(), mapping.disk().name.as_str());
            self.formats().format_inside(names, &under, &inside, format).await
        })
    }

    fn lock<'a>(&'a self, mapping: &'a Mapping) -> Answer<'a, (), LockError> {
        Box::pin(self.close(mapping))
    }

    fn grow_mapping<'a>(
        &'a self,
        mapping: &'a Mapping,
        key: Option<&'a Passphrase>,
    ) -> Answer<'a, (), GrowMappingError> {
        Box::pin(self.resize(mapping, key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p9_no_argument_of_cryptsetup_is_secret() {
        let disk = Path::new("/proc/7/fd/9");
        let cost = KeyCost::default();
        assert_eq!(
            format_arguments(&cost, disk).join(" "),
            "luksFormat --batch-mode --type luks2 --subsystem proxmox-csi --pbkdf argon2id --pbkdf-memory 65536 --iter-time 1000 \
             --key-file - /proc/7/fd/9"
        );
        let cheap = KeyCost { pbkdf: Pbkdf::Pbkdf2, iterations: Some(1000), ..cost };
        assert_eq!(
            format_arguments(&cheap, disk).join(" "),
            "luksFormat --batch-mode --type luks2 --subsystem proxmox-csi --pbkdf pbkdf2 --pbkdf-force-iterations 1000 \
             --key-file - /proc/7/fd/9"
        );
        assert_eq!(
            open_arguments(disk, false, "a").join(" "),
            "open --type luks --disable-keyring --key-file - /proc/7/fd/9 a"
        );
        assert!(open_arguments(disk, true, "a").contains(&"--readonly".to_owned()));
    }
}

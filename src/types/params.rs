//! Parameters of a StorageClass, which come back as the volume context of a PV.
//!
//! Read [`Parameters::of_new_volume`] first. A new volume is refused for a value that means nothing; an existing PV
//! is never refused for what stands in it ([`Parameters::of_existing_volume`]).

use std::{collections::BTreeMap, fmt, str::FromStr};

use super::{ParseError, StorageId, props::PropertyString};

/// The format of a disk image on a file storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ImageFormat {
    /// A plain file, the default.
    #[default]
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

impl FromStr for ImageFormat {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(ParseError::new("storageFormat", text, "it must be raw or qcow2")),
        }
    }
}

/// What a StorageClass says of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Parameters {
    /// The Proxmox storage new volumes are allocated on.
    pub storage: Option<StorageId>,
    /// The image format on file storages.
    pub format: ImageFormat,
    /// How the disk is plugged into a VM.
    pub drive: DriveOptions,
    /// How the node formats and mounts it.
    pub filesystem: FilesystemOptions,
    /// Whether replication is asked for, which this driver does not do.
    pub replicate: bool,
}

/// Options of the drive string of an attached disk (qemu-server `QemuServer/Drive.pm`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriveOptions {
    /// `aio=`: `native`, `threads` or `io_uring`.
    pub aio: Option<String>,
    /// `backup=`: whether vzdump includes the disk.
    pub backup: bool,
    /// `cache=`: none, writethrough, writeback, unsafe or directsync.
    pub cache: Option<String>,
    /// `iothread=`.
    pub iothread: bool,
    /// `ssd=1` and `discard=on`.
    pub ssd: bool,
    /// Limits, as keys of the drive string: `iops_rd`, `iops_wr`, `mbps_rd`, `mbps_wr`.
    pub limits: BTreeMap<&'static str, u32>,
}

impl Default for DriveOptions {
    fn default() -> Self {
        Self { aio: None, backup: false, cache: None, iothread: true, ssd: false, limits: BTreeMap::new() }
    }
}

impl DriveOptions {
    /// Sets a limit under these keys; zero takes it away.
    pub(super) fn set_limit(&mut self, keys: &[&'static str], limit: u32) {
        for key in keys {
            if limit == 0 {
                self.limits.remove(key);
            } else {
                self.limits.insert(key, limit);
            }
        }
    }

    /// Writes the options into the drive string of a disk.
    pub fn write_to(&self, drive: &mut PropertyString) -> Result<(), ParseError> {
        let flag = |on: bool| if on { "1" } else { "0" };
        drive.set("backup", flag(self.backup))?;
        drive.set("iothread", flag(self.iothread))?;
        // A volume is never part of the VM's own replication job.
        drive.set("replicate", "0")?;
        if let Some(aio) = &self.aio {
            drive.set("aio", aio)?;
        }
        if let Some(cache) = &self.cache {
            drive.set("cache", cache)?;
        }
        if self.ssd {
            drive.set("ssd", "1")?;
            drive.set("discard", "on")?;
        }
        for (key, limit) in &self.limits {
            drive.set(key, &limit.to_string())?;
        }
        Ok(())
    }
}

/// How a node formats and mounts a volume.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FilesystemOptions {
    /// Block size in bytes (`mkfs.ext4 -b`, `mkfs.xfs -b size=`).
    pub block_size: Option<u32>,
    /// Inode size in bytes (`mkfs.ext4 -I`, `mkfs.xfs -i size=`).
    pub inode_size: Option<u32>,
    /// Mount with `noatime`: the disk is an SSD.
    pub noatime: bool,
}

/// A parameter that means nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("parameter `{key}` can not be `{value}`: it must be {expected}")]
pub struct ParameterError {
    /// The key.
    pub key: String,
    /// The refused value.
    pub value: String,
    /// What would be accepted.
    pub expected: &'static str,
}

/// What is odd about the parameters and was passed over.
pub type Warnings = Vec<String>;

impl Parameters {
    /// Reads the parameters of a new volume. Refuses values that mean nothing; keys that are unknown are named in the warnings,
    /// except those that Kubernetes adds.
    pub fn of_new_volume(map: &BTreeMap<String, String>) -> Result<(Self, Warnings), ParameterError> {
        let mut warnings = Vec::new();
        let mut parameters = Self::default();
        for (key, value) in map {
            if !parameters.read(key, value)? && !is_of_kubernetes(key) {
                warnings.push(format!("parameter `{key}` is unknown and has no effect"));
            }
        }
        Ok((parameters, warnings))
    }

    /// Reads the volume context of an existing PV. What means nothing keeps its default and is named in the warnings.
    pub fn of_existing_volume(map: &BTreeMap<String, String>) -> (Self, Warnings) {
        let mut warnings = Vec::new();
        let mut parameters = Self::default();
        for (key, value) in map {
            if let Err(error) = parameters.read(key, value) {
                warnings.push(error.to_string());
            }
        }
        (parameters, warnings)
    }

    /// Takes one parameter; tells whether the key is known.
    fn read(&mut self, key: &str, value: &str) -> Result<bool, ParameterError> {
        match key {
            "storage" => {
                self.storage =
                    Some(value.parse().map_err(|_| refuse(key, value, "the id of a Proxmox storage"))?);
            }
            "storageFormat" => {
                self.format = value.parse().map_err(|_| refuse(key, value, "raw or qcow2"))?;
            }
            "aio" => {
                self.drive.aio = Some(one_of(
                    key,
                    value,
                    &["native", "threads", "io_uring"],
                    "native, threads or io_uring",
                )?);
            }
            "cache" => {
                self.drive.cache = Some(one_of(
                    key,
                    value,
                    &["none", "writethrough", "writeback", "unsafe", "directsync"],
                    "none, writethrough, writeback, unsafe or directsync",
                )?);
            }
            "backup" => self.drive.backup = flag(key, value)?,
            "iothread" => self.drive.iothread = flag(key, value)?,
            "ssd" => {
                self.drive.ssd = flag(key, value)?;
                self.filesystem.noatime = self.drive.ssd;
            }
            "replicate" => self.replicate = flag(key, value)?,
            "replicateSchedule" | "replicateZones" | "resizeRequired" | "resizeSizeBytes" => {}
            "diskIOPS" => self.limit(&["iops_rd", "iops_wr"], key, value)?,
            "diskMBps" => self.limit(&["mbps_rd", "mbps_wr"], key, value)?,
            "iops_rd" => self.limit(&["iops_rd"], key, value)?,
            "iops_wr" => self.limit(&["iops_wr"], key, value)?,
            "mbps_rd" => self.limit(&["mbps_rd"], key, value)?,
            "mbps_wr" => self.limit(&["mbps_wr"], key, value)?,
            "blockSize" => self.filesystem.block_size = Some(power_of_two(key, value)?),
            "inodeSize" => self.filesystem.inode_size = Some(power_of_two(key, value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn limit(&mut self, names: &[&'static str], key: &str, value: &str) -> Result<(), ParameterError> {
        self.drive.set_limit(names, whole_number(key, value)?);
        Ok(())
    }
}

fn is_of_kubernetes(key: &str) -> bool {
    key.starts_with("csi.storage.k8s.io/") || key.starts_with("storage.kubernetes.io/")
}

fn refuse(key: &str, value: &str, expected: &'static str) -> ParameterError {
    ParameterError { key: key.to_owned(), value: value.to_owned(), expected }
}

fn one_of(
    key: &str,
    value: &str,
    allowed: &[&str],
    expected: &'static str,
) -> Result<String, ParameterError> {
    if allowed.contains(&value) { Ok(value.to_owned()) } else { Err(refuse(key, value, expected)) }
}

/// The spellings of a boolean that Go's `strconv.ParseBool` takes: they stand in StorageClasses and PVs of today.
pub(super) fn flag(key: &str, value: &str) -> Result<bool, ParameterError> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(refuse(key, value, "true or false")),
    }
}

pub(super) fn whole_number(key: &str, value: &str) -> Result<u32, ParameterError> {
    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
    value
        .parse()
        .ok()
        .filter(|_| digits)
        .ok_or_else(|| refuse(key, value, "a whole number; 0 means no limit"))
}

fn power_of_two(key: &str, value: &str) -> Result<u32, ParameterError> {
    let expected = "a power of two from 256 to 65536";
    let size: u32 = value.parse().map_err(|_| refuse(key, value, expected))?;
    if size.is_power_of_two() && (256..=65536).contains(&size) {
        Ok(size)
    } else {
        Err(refuse(key, value, expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn a_storage_class_of_today_is_understood() {
        let (parameters, warnings) = Parameters::of_new_volume(&map(&[
            ("storage", "local-lvm"),
            ("ssd", "true"),
            ("cache", "writethrough"),
            ("diskIOPS", "1000"),
            ("blockSize", "4096"),
            ("inodeSize", "512"),
            ("csi.storage.k8s.io/fstype", "xfs"),
            ("nonsense", "1"),
        ]))
        .expect("legal parameters");
        assert_eq!(
            parameters.filesystem,
            FilesystemOptions { block_size: Some(4096), inode_size: Some(512), noatime: true }
        );
        assert_eq!(warnings, ["parameter `nonsense` is unknown and has no effect"]);
        let mut drive = PropertyString::with_bare("local-lvm:vm-9999-x").expect("a volid");
        parameters.drive.write_to(&mut drive).expect("legal options");
        assert_eq!(
            drive.to_string(),
            "local-lvm:vm-9999-x,backup=0,cache=writethrough,discard=on,iops_rd=1000,iops_wr=1000,iothread=1,replicate=0,ssd=1"
        );
    }

    #[test]
    fn what_means_nothing_is_refused_for_a_new_volume_and_passed_over_for_an_old_one() {
        for (key, value) in [
            ("ssd", "yes"),
            ("cache", "none,backup=1"),
            ("blockSize", "1000"),
            ("storage", "a b"),
            ("diskMBps", "-1"),
        ] {
            let map = map(&[(key, value)]);
            assert!(Parameters::of_new_volume(&map).is_err(), "{key}");
            let (parameters, warnings) = Parameters::of_existing_volume(&map);
            assert_eq!((parameters, warnings.len()), (Parameters::default(), 1), "{key}");
        }
    }
}

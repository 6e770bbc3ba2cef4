//! Drive strings: `local:9999/vm-9999-x.raw,backup=0,size=1G` (qemu-server `QemuServer/Drive.pm`) and disk sizes
//! (pve-common `JSONSchema.pm:parse_size`, `format_size`).

use std::collections::BTreeMap;

/// A drive as PVE keeps it: the volume, and its options sorted by name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Drive {
    /// The volume id, or `STORE:SIZE` for a disk to be made.
    pub file: String,
    /// All other options.
    pub options: BTreeMap<String, String>,
}

enum Check {
    Boolean,
    Integer(u64),
    Number,
    OneOf(&'static [&'static str]),
    Serial,
    Wwn,
    Size,
    Words(usize),
    Any,
}

const NOT_DEFINED: &str =
    "property is not defined in schema and the schema does not allow additional properties";

/// The options of a SCSI drive (`Drive.pm:$scsidesc` and the formats it is made of).
fn check_of(option: &str) -> Option<Check> {
    Some(match option {
        "backup" | "detect_zeroes" | "iothread" | "replicate" | "ro" | "scsiblock" | "shared"
        | "snapshot" | "ssd" => Check::Boolean,
        "queues" => Check::Integer(2),
        "bps" | "bps_rd" | "bps_wr" | "iops" | "iops_max" | "iops_rd" | "iops_rd_max" | "iops_wr"
        | "iops_wr_max" => Check::Integer(0),
        "bps_max_length" | "bps_rd_max_length" | "bps_wr_max_length" | "iops_max_length"
        | "iops_rd_max_length" | "iops_wr_max_length" => Check::Integer(1),
        "mbps" | "mbps_max" | "mbps_rd" | "mbps_rd_max" | "mbps_wr" | "mbps_wr_max" => Check::Number,
        "aio" => Check::OneOf(&["native", "threads", "io_uring"]),
        "cache" => Check::OneOf(&["none", "writethrough", "writeback", "unsafe", "directsync"]),
        "discard" => Check::OneOf(&["ignore", "on"]),
        "format" => Check::OneOf(&["raw", "qcow", "qed", "qcow2", "vmdk", "cloop"]),
        "media" => Check::OneOf(&["cdrom", "disk"]),
        "rerror" => Check::OneOf(&["ignore", "report", "stop"]),
        "werror" => Check::OneOf(&["enospc", "ignore", "report", "stop"]),
        "serial" => Check::Serial,
        "wwn" => Check::Wwn,
        "size" => Check::Size,
        "product" => Check::Words(16),
        "vendor" => Check::Words(8),
        "import-from" => Check::Any,
        _ => return None,
    })
}

fn check(value: &str, rule: &Check) -> Result<String, String> {
    let pattern = || "value does not match the regex pattern".to_owned();
    match rule {
        Check::Boolean => match value.to_ascii_lowercase().as_str() {
            "1" | "on" | "yes" | "true" => Ok("1".to_owned()),
            "0" | "off" | "no" | "false" => Ok("0".to_owned()),
            _ => Err(format!("type check ('boolean') failed - got '{value}'")),
        },
        Check::Integer(minimum) => match value.parse::<u64>() {
            Ok(number) if number >= *minimum => Ok(value.to_owned()),
            Ok(_) => Err(format!("value must have a minimum value of {minimum}")),
            Err(_) => Err(format!("type check ('integer') failed - got '{value}'")),
        },
        Check::Number => match value.parse::<f64>() {
            Ok(_) => Ok(value.to_owned()),
            Err(_) => Err(format!("type check ('number') failed - got '{value}'")),
        },
        Check::OneOf(values) if values.contains(&value) => Ok(value.to_owned()),
        Check::OneOf(values) => {
            Err(format!("value '{value}' does not have a value in the enumeration '{}'", values.join(", ")))
        }
        Check::Serial if value.len() > 60 => Err("value may only be 60 characters long".to_owned()),
        Check::Wwn => {
            let digits = value.strip_prefix("0x").ok_or_else(pattern)?;
            if digits.len() >= 16 && digits.chars().take(16).all(|c| c.is_ascii_hexdigit()) {
                Ok(value.to_owned())
            } else {
                Err(pattern())
            }
        }
        Check::Size => match parse_size(value) {
            Some(_) => Ok(value.to_owned()),
            None => Err(format!("invalid format - value does not look like a valid disk size: {value}")),
        },
        Check::Words(most) => {
            if value.len() <= *most && value.chars().all(|c| c.is_ascii_alphanumeric() || "-_ ".contains(c)) {
                Ok(value.to_owned())
            } else {
                Err(pattern())
            }
        }
        Check::Serial | Check::Any => Ok(value.to_owned()),
    }
}

impl Drive {
    /// Reads the value of `key` as an API parameter. The error is the text PVE puts under that parameter
    /// (`JSONSchema.pm:parse_property_string`).
    pub fn parse(key: &str, text: &str) -> Result<Self, String> {
        let format_error =
            |lines: &[String]| format!("invalid format - format error\n{}\n", lines.join("\n"));
        let mut file = None;
        let mut options = BTreeMap::new();
        let mut errors = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').unwrap_or(("file", part));
            if matches!(name, "file" | "volume") {
                if file.replace(value.to_owned()).is_some() {
                    return Err(format_error(&[
                        "duplicate key in comma-separated list property: file".to_owned()
                    ]));
                }
                continue;
            }
            match check_of(name) {
                None => errors.push(format!("{key}.{name}: {NOT_DEFINED}")),
                Some(rule) => match check(value, &rule) {
                    Ok(value) => {
                        if options.insert(name.to_owned(), value).is_some() {
                            return Err(format_error(&[format!(
                                "duplicate key in comma-separated list property: {name}"
                            )]));
                        }
                    }
                    Err(error) => errors.push(format!("{key}.{name}: {error}")),
                },
            }
        }
        match &file {
            None => errors.push(format!("{key}.file: property is missing and it is not optional")),
            Some(file) if !file.contains(':') && !file.starts_with('/') && file != "none" => {
                errors.push(format!("{key}.file: invalid format - unable to parse volume ID '{file}'\n"));
            }
            Some(_) => {}
        }
        match file {
            Some(file) if errors.is_empty() => Ok(Self { file, options }),
            _ => {
                errors.sort();
                Err(format_error(&errors))
            }
        }
    }

    /// Reads a value from a config file: what does not parse is kept out of sight, as PVE does with a warning
    /// (`QemuServer/Drive.pm:parse_drive`).
    pub fn stored(key: &str, text: &str) -> Option<Self> {
        Self::parse(key, text).ok()
    }

    /// The volume as `(storage, name)`, `None` for paths (pve-storage `Storage.pm:parse_volume_id`).
    pub fn volume(&self) -> Option<(&str, &str)> {
        if self.file.starts_with('/') { None } else { self.file.split_once(':') }
    }

    /// The size in GiB of a disk that is to be made: the `1` of `local:1` (`Drive.pm:$NEW_DISK_RE`).
    pub fn new_disk(&self) -> Option<(&str, f64)> {
        let (storage, size) = self.volume()?;
        (!size.is_empty() && size.chars().all(|c| c.is_ascii_digit() || c == '.')).then_some(())?;
        size.parse().ok().map(|size| (storage, size))
    }

    /// Whether the drive is a CD-ROM (`QemuServer/Drive.pm:drive_is_cdrom`).
    pub fn is_cdrom(&self) -> bool {
        self.options.get("media").is_some_and(|media| media == "cdrom") || self.file == "none"
    }

    /// Whether the option is set to a true value.
    pub fn flag(&self, option: &str) -> bool {
        self.options.get(option).is_some_and(|value| value == "1")
    }

    /// Whether changing the disk from `other` to `self` needs more than a live throttle change
    /// (`QemuServer.pm:vmconfig_update_disk`).
    pub fn differs_coldly(&self, other: &Self) -> bool {
        ["aio", "discard", "iothread", "queues", "product", "cache", "ssd", "vendor", "ro"]
            .iter()
            .any(|option| self.options.get(*option) != other.options.get(*option))
    }
}

impl std::fmt::Display for Drive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.file)?;
        self.options.iter().try_for_each(|(name, value)| write!(f, ",{name}={value}"))
    }
}

/// Bytes of a disk size such as `1G`, `1.5G` or `1048577` (pve-common `JSONSchema.pm:parse_size`).
pub fn parse_size(text: &str) -> Option<u64> {
    let (digits, unit) = match text.char_indices().last()? {
        (at, 'K') => (&text[..at], 1_u64 << 10),
        (at, 'M') => (&text[..at], 1 << 20),
        (at, 'G') => (&text[..at], 1 << 30),
        (at, 'T') => (&text[..at], 1 << 40),
        _ => (text, 1),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    (!whole.is_empty() && whole.chars().chain(fraction.chars()).all(|c| c.is_ascii_digit())).then_some(())?;
    (!digits.ends_with('.')).then_some(())?;
    let number: u128 = format!("{whole}{fraction}").parse().ok()?;
    let scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    u64::try_from(number.checked_mul(u128::from(unit))? / scale).ok()
}

/// The shortest exact size: `1G`, `1200M`, or bytes where no unit divides it (pve-common
/// `JSONSchema.pm:format_size`).
pub fn format_size(bytes: u64) -> String {
    let mut size = bytes;
    let mut unit = "";
    for next in ["K", "M", "G", "T"] {
        if size == 0 || !size.is_multiple_of(1024) {
            break;
        }
        size /= 1024;
        unit = next;
    }
    format!("{size}{unit}")
}

/// Whether `key` names a drive (`Drive.pm:is_valid_drivename`).
pub fn is_drive_key(key: &str) -> bool {
    [("ide", 4), ("sata", 6), ("scsi", 31), ("virtio", 16), ("efidisk", 1), ("tpmstate", 1)]
        .iter()
        .any(|(prefix, count)| index_of(key, prefix).is_some_and(|index| index < *count))
        || index_of(key, "unused").is_some_and(|index| index < 256)
}

/// A key that sorts drives as PVE goes through them: `scsi2` before `scsi11` (`Drive.pm:valid_drive_names`).
pub fn in_order(key: &str) -> (String, u32) {
    let stem = key.trim_end_matches(|c: char| c.is_ascii_digit());
    (stem.to_owned(), index_of(key, stem).unwrap_or_default())
}

/// The number behind `prefix` when `key` is exactly that, without leading zeros.
pub fn index_of(key: &str, prefix: &str) -> Option<u32> {
    let digits = key.strip_prefix(prefix)?;
    (digits == "0" || !digits.starts_with('0')).then_some(())?;
    digits.chars().all(|c| c.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_drive_comes_back_with_sorted_keys() {
        let drive = Drive::parse(
            "scsi1",
            "local:9999/x.raw,wwn=0x5056432d00000010,serial=pvc10,backup=0,discard=on,iothread=1,ssd=1,size=1G",
        );
        assert_eq!(
            drive.map(|d| d.to_string()).as_deref(),
            Ok(
                "local:9999/x.raw,backup=0,discard=on,iothread=1,serial=pvc10,size=1G,ssd=1,wwn=0x5056432d00000010"
            )
        );
    }

    /// Recorded as C27 and C29.
    #[test]
    fn bad_options_are_refused_with_the_recorded_texts() {
        assert_eq!(
            Drive::parse("scsi4", "local:9999/x.raw,wwn=5056432d00000010"),
            Err("invalid format - format error\nscsi4.wwn: value does not match the regex pattern\n"
                .to_owned())
        );
        assert_eq!(
            Drive::parse("scsi4", &format!("local:9999/x.raw,serial={}", "a".repeat(61))),
            Err("invalid format - format error\nscsi4.serial: value may only be 60 characters long\n"
                .to_owned())
        );
    }

    #[test]
    fn sizes_are_written_in_the_largest_exact_unit() {
        for (bytes, text) in
            [(1_073_741_824, "1G"), (1_258_291_200, "1200M"), (3_221_225_473, "3221225473"), (0, "0")]
        {
            assert_eq!(format_size(bytes), text);
            assert_eq!(parse_size(text), Some(bytes));
        }
        assert_eq!(parse_size("1.5G"), Some(1_610_612_736));
        assert_eq!(parse_size("5X"), None);
    }

    proptest! {
        #[test]
        fn sizes_survive_writing(bytes in 0_u64..(1 << 50)) {
            prop_assert_eq!(parse_size(&format_size(bytes)), Some(bytes));
        }

        #[test]
        fn a_written_drive_is_a_read_drive(
            name in "[a-z0-9-]{1,20}",
            backup in any::<bool>(),
            serial in proptest::option::of("[a-zA-Z0-9-]{1,36}"),
            wwn in proptest::option::of("[0-9a-f]{16}"),
        ) {
            let mut options = BTreeMap::from([("backup".to_owned(), u8::from(backup).to_string())]);
            options.extend(serial.map(|s| ("serial".to_owned(), s)));
            options.extend(wwn.map(|w| ("wwn".to_owned(), format!("0x{w}"))));
            let drive = Drive { file: format!("local:9999/vm-9999-{name}.raw"), options };
            prop_assert_eq!(Drive::parse("scsi1", &drive.to_string()), Ok(drive));
        }
    }
}

//! Directory storages: volume names, allocation and what a missing volume looks like
//! (pve-storage `Storage/Plugin.pm`, `Storage/DirPlugin.pm`, `API2/Storage/Content.pm`).

use super::error::PveError;

/// A volume name of a directory storage, `9999/vm-9999-x.raw`, or that of a linked clone,
/// `100/base-100-disk-0.raw/101/vm-101-disk-0.qcow2`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeName<'a> {
    /// The VM id the directory stands for.
    pub owner: u32,
    /// The file's name.
    pub file: &'a str,
    /// The base volume of a linked clone.
    pub base: Option<&'a str>,
    /// Image format, by the extension.
    pub format: &'static str,
}

fn format_of(file: &str) -> Option<&'static str> {
    let (stem, extension) = file.rsplit_once('.')?;
    (!stem.is_empty()).then_some(())?;
    ["raw", "qcow2", "vmdk", "subvol"].into_iter().find(|format| *format == extension)
}

/// The parts of `name` (`Plugin.pm:parse_volname`, the image branches).
pub fn parse_volname(name: &str) -> Result<VolumeName<'_>, PveError> {
    let unable = || PveError::die(format!("unable to parse directory volume name '{name}'"));
    let number = |text: &str| text.parse::<u32>().ok().filter(|_| !text.starts_with('0'));
    let (owner, file) = name.split_once('/').ok_or_else(unable)?;
    let owner = number(owner).ok_or_else(unable)?;
    if file.is_empty() || file.contains([' ', '\t', '\n']) {
        return Err(unable());
    }
    if let [base, of, file] = file.split('/').collect::<Vec<_>>().as_slice()
        && let Some(clone) = number(of)
    {
        parse_filename(base)?;
        let base = name.get(..name.len() - of.len() - file.len() - 2);
        return Ok(VolumeName { owner: clone, file, base, format: parse_filename(file)? });
    }
    Ok(VolumeName { owner, file, base: None, format: parse_filename(file)? })
}

/// Checks the file name of an allocation and returns its format
/// (`Plugin.pm:parse_name_dir`).
pub fn parse_filename(file: &str) -> Result<&'static str, PveError> {
    if file.starts_with("snap-") && file.strip_suffix(".qcow2").is_some() {
        return Err(PveError::die(format!("'{file}' is a snapshot filename, not a volume!")));
    }
    (!file.contains(['/', ' ', '\t', '\n']))
        .then(|| format_of(file))
        .flatten()
        .ok_or_else(|| PveError::die(format!("unable to parse volume filename '{file}'")))
}

/// Bytes of the `size` of an allocation: a plain number counts KiB (`Content.pm:create`).
pub fn alloc_bytes(size: &str) -> Option<u64> {
    let (digits, unit) = match size.char_indices().last()? {
        (at, 'M') => (&size[..at], 1_u64 << 20),
        (at, 'G') => (&size[..at], 1 << 30),
        _ => (size, 1 << 10),
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

/// The largest raw image qemu-img makes on ext4 or xfs; beyond it, it refuses (recorded as B18).
pub const LARGEST_IMAGE: u64 = 1 << 53;

/// What `qemu-img create` says of an image it makes (`Storage/Common.pm:qemu_img_create`).
pub fn formatting(path: &str, size: u64, format: &str) -> String {
    match format {
        "qcow2" => format!(
            "Formatting '{path}', fmt=qcow2 cluster_size=65536 extended_l2=off preallocation=metadata \
             compression_type=zlib size={size} lazy_refcounts=off refcount_bits=16"
        ),
        _ => format!("Formatting '{path}', fmt={format} size={size} preallocation=off"),
    }
}

/// Refuses an image no file can be that large for (`Storage/Common.pm:qemu_img_create`).
pub fn too_large(path: &str) -> PveError {
    PveError::die(format!(
        "unable to create image: qemu-img: {path}: The image size is too large for file format 'raw'"
    ))
}

/// The answer to an allocation on a storage without room (`Storage/Common.pm:qemu_img_create`).
pub fn no_space(path: &str) -> PveError {
    PveError::die(format!(
        "unable to create image: qemu-img: {path}: Could not resize file: No space left on device"
    ))
}

/// The answer to an allocation of a name that is taken (`Plugin.pm:alloc_image`).
pub fn exists(path: &str) -> PveError {
    PveError::die(format!("disk image '{path}' already exists"))
}

/// The error of reading a volume that is not there (recorded as B40) (`API2/Storage/Content.pm:info`,
/// `Storage.pm:volume_size_info`).
pub fn no_format(volid: &str) -> PveError {
    PveError::die(format!("volume_size_info on '{volid}' failed - no format"))
}

/// The error of using a volume that is not there (`Plugin.pm:activate_volume`, recorded as C33).
pub fn missing(volid: &str) -> PveError {
    PveError::die(format!("volume '{volid}' does not exist"))
}

/// Names volume ids as the content calls take them: with or without the storage in front
/// (`API2/Storage/Content.pm:$real_volume_id`).
pub fn full_volid(storage: &str, volume: &str) -> Result<String, PveError> {
    match volume.split_once(':') {
        None => Ok(format!("{storage}:{volume}")),
        Some((named, _)) if named == storage => Ok(volume.to_owned()),
        Some((named, _)) => {
            Err(PveError::parameter("volume", format!("storage ID mismatch ({named} != {storage})\n")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Recorded as B13 to B29 and B42.
    #[test]
    fn names_follow_the_recorded_rules() {
        assert!(parse_filename("vm-9999-pvc-1").is_err());
        assert!(parse_filename("vm-9999-a b+c.raw").is_err());
        assert_eq!(parse_filename("pvc-xyz.raw"), Ok("raw"));
        assert_eq!(parse_filename("vm-9999-A_b.c-D.raw"), Ok("raw"));
        assert_eq!(
            parse_volname("foo").map_err(|e| e.message().to_owned()),
            Err("unable to parse directory volume name 'foo'".to_owned())
        );
        assert_eq!(parse_volname("9999/vm-9998-x.qcow2").map(|v| (v.owner, v.format)), Ok((9999, "qcow2")));
        assert_eq!(alloc_bytes("1025"), Some(1_049_600));
        assert_eq!(alloc_bytes("0"), Some(0));
    }
}

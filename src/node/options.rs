//! Mount options that a StorageClass or a PV may ask for.

/// Checked mount options, each one word.
///
/// Printed as their number only: CSI allows secrets in them.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct MountFlags(Vec<String>);

/// A mount option that is not passed on. The option itself is not in the text: it may be a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MountFlagsError {
    /// Not one option.
    #[error(
        "mount option {0} of the list is no option: it is empty or holds a comma, a blank or a control character"
    )]
    NotOne(usize),
    /// It would mount something else, or somewhere else.
    #[error("mount option {place} of the list (`{name}`) is not allowed: {why}")]
    Refused {
        /// Its place in the list, from 1.
        place: usize,
        /// Its name; one of a fixed list.
        name: &'static str,
        /// The reason.
        why: &'static str,
    },
}

/// What makes the mount another act than mounting this disk, or harms the node.
const REFUSED: [(&str, &str); 16] = [
    ("bind", "a volume is mounted, not bound"),
    ("rbind", "a volume is mounted, not bound"),
    ("move", "a volume is mounted, not moved"),
    ("remount", "a volume is mounted once"),
    ("loop", "a volume is a disk"),
    ("offset", "a volume is a disk"),
    ("sizelimit", "a volume is a disk"),
    ("shared", "propagation is the orchestrator's"),
    ("rshared", "propagation is the orchestrator's"),
    ("journal_dev", "it names another device"),
    ("journal_path", "it names another device"),
    ("logdev", "it names another device"),
    ("rtdev", "it names another device"),
    ("errors=panic", "it would stop the node"),
    ("helper", "it would run a program"),
    ("fscontext", "labels are the orchestrator's"),
];

/// What is so by default, or is for mount(8) and systemd only.
const WITHOUT_EFFECT: [&str; 16] = [
    "defaults",
    "rw",
    "dev",
    "suid",
    "exec",
    "async",
    "atime",
    "diratime",
    "auto",
    "noauto",
    "nofail",
    "nouser",
    "loud",
    "silent",
    "norelatime",
    "_netdev",
];

/// What lets others than root mount, which is for mount(8) only, and the options it implies there.
const IMPLYING: [(&str, &[&str]); 4] = [
    ("user", &["noexec", "nosuid", "nodev"]),
    ("users", &["noexec", "nosuid", "nodev"]),
    ("owner", &["nosuid", "nodev"]),
    ("group", &["nosuid", "nodev"]),
];

impl MountFlags {
    /// Checks the options of a volume capability.
    pub fn new(flags: &[String]) -> Result<Self, MountFlagsError> {
        let mut checked: Vec<String> = Vec::new();
        for (index, flag) in flags.iter().enumerate() {
            let place = index + 1;
            if flag.is_empty() || flag.chars().any(|c| c == ',' || c.is_whitespace() || c.is_control()) {
                return Err(MountFlagsError::NotOne(place));
            }
            let key = flag.split_once('=').map_or(flag.as_str(), |(key, _)| key);
            if let Some((name, why)) = REFUSED.iter().find(|(name, _)| *name == key || *name == flag) {
                return Err(MountFlagsError::Refused { place, name, why });
            }
            if matches!(key, "dev" | "suid" | "exec") {
                // The last one counts, as for mount(8): `user,exec` lets programs run.
                checked.retain(|other| other.strip_prefix("no") != Some(key));
            }
            let without_effect = WITHOUT_EFFECT.contains(&key)
                || key.get(..2).is_some_and(|head| head.eq_ignore_ascii_case("x-"))
                || key == "comment";
            let own = [flag.as_str()];
            let meant: &[&str] = match IMPLYING.iter().find(|(name, _)| *name == flag) {
                Some((_, implied)) => implied,
                None if without_effect => &[],
                None => &own,
            };
            for flag in meant {
                if !checked.iter().any(|other| other == flag) {
                    checked.push((*flag).to_owned());
                }
            }
        }
        Ok(Self(checked))
    }

    /// Whether the mount shall take no writes.
    pub fn readonly(&self) -> bool {
        self.0.iter().any(|flag| flag == "ro")
    }

    /// The options without `ro`, which is a property of its own.
    pub(super) fn others(&self) -> impl Iterator<Item = &String> {
        self.0.iter().filter(|flag| *flag != "ro")
    }
}

impl std::fmt::Debug for MountFlags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MountFlags({} options)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn flags(flags: &[&str]) -> Result<MountFlags, MountFlagsError> {
        MountFlags::new(&flags.iter().map(|flag| (*flag).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn options_that_mount_something_else_are_refused() {
        for bad in
            ["bind", "remount", "logdev=/dev/sda", "journal_path=/dev/sda", "errors=panic", "a,b", "", "a b"]
        {
            assert!(flags(&[bad]).is_err(), "{bad}");
        }
        let good = flags(&["ro", "noatime", "errors=remount-ro", "rw", "x-systemd.device-timeout=1"]);
        let good = good.expect("harmless options");
        assert!(good.readonly());
        assert_eq!(good.others().collect::<Vec<_>>(), ["noatime", "errors=remount-ro"]);
        assert_eq!(format!("{good:?}"), "MountFlags(3 options)");
    }

    #[test]
    fn options_that_only_mount_8_knows_are_translated_or_passed_over() {
        let old =
            ["nouser", "loud", "norelatime", "X-mount.mkdir=0755", "x-gvfs-hide", "_netdev", "nosymfollow"];
        let old = flags(&old).expect("harmless options");
        assert_eq!(old.others().collect::<Vec<_>>(), ["nosymfollow"]);
        let user = flags(&["user", "exec"]).expect("harmless options");
        assert_eq!(user.others().collect::<Vec<_>>(), ["nosuid", "nodev"]);
        let group = flags(&["group"]).expect("harmless options");
        assert_eq!(group.others().collect::<Vec<_>>(), ["nosuid", "nodev"]);
    }

    proptest! {
        #[test]
        fn no_option_brings_another(flag in ".*") {
            if let Ok(checked) = MountFlags::new(&[flag]) {
                prop_assert!(checked.0.iter().all(|flag| !flag.contains([',', ' ', '\n', '\0'])));
            }
        }
    }
}

//! What a `VolumeAttributesClass` says: options of a volume that may change while it exists.

use std::collections::BTreeMap;

use super::params::{DriveOptions, ParameterError, flag, whole_number};

/// Changed options of a volume, by the keys of a `VolumeAttributesClass`: `backup`, `diskIOPS`, `diskMBps`. A key that is not there
/// leaves what the volume was made with.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attributes {
    backup: Option<bool>,
    iops: Option<u32>,
    mbps: Option<u32>,
}

/// Attributes that can't be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttributesError {
    /// A key that can't be changed, or is none.
    #[error(
        "`{0}` is nothing that can be changed of a volume; hint: `backup`, `diskIOPS` and `diskMBps` can"
    )]
    Key(String),
    /// A value that means nothing.
    #[error(transparent)]
    Value(#[from] ParameterError),
}

const BACKUP: &str = "backup";
const IOPS: &str = "diskIOPS";
const MBPS: &str = "diskMBps";

impl Attributes {
    /// Reads the parameters of a class: all of them, or none.
    pub fn parse(map: &BTreeMap<String, String>) -> Result<Self, AttributesError> {
        let mut attributes = Self::default();
        for (key, value) in map {
            match key.as_str() {
                BACKUP => attributes.backup = Some(flag(key, value)?),
                IOPS => attributes.iops = Some(whole_number(key, value)?),
                MBPS => attributes.mbps = Some(whole_number(key, value)?),
                _ => return Err(AttributesError::Key(key.clone())),
            }
        }
        Ok(attributes)
    }

    /// Reads what is understood of attributes that somebody else wrote.
    pub fn parse_known(map: &BTreeMap<String, String>) -> Self {
        let mut all = Self::default();
        for (key, value) in map {
            if let Ok(one) = Self::parse(&BTreeMap::from([(key.clone(), value.clone())])) {
                all = all.changed_by(&one);
            }
        }
        all
    }

    /// These with the changes of others, which win.
    #[must_use]
    pub fn changed_by(&self, newer: &Self) -> Self {
        Self {
            backup: newer.backup.or(self.backup),
            iops: newer.iops.or(self.iops),
            mbps: newer.mbps.or(self.mbps),
        }
    }

    /// Whether nothing is changed.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The attributes by their keys.
    pub fn to_map(&self) -> BTreeMap<String, String> {
        let pairs = [
            (BACKUP, self.backup.map(|on| on.to_string())),
            (IOPS, self.iops.map(|limit| limit.to_string())),
            (MBPS, self.mbps.map(|limit| limit.to_string())),
        ];
        pairs.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
    }

    /// The options of a drive with the changes. A limit of zero is none.
    pub fn apply_to(&self, options: &mut DriveOptions) {
        if let Some(backup) = self.backup {
            options.backup = backup;
        }
        for (limit, keys) in [(self.iops, ["iops_rd", "iops_wr"]), (self.mbps, ["mbps_rd", "mbps_wr"])] {
            if let Some(limit) = limit {
                options.set_limit(&keys, limit);
            }
        }
    }

    /// What the drive string of an attached volume is to have of them: the value of each key, none for a key that is not to be there.
    pub fn of_drive(&self) -> BTreeMap<&'static str, Option<String>> {
        let mut wanted = BTreeMap::new();
        if let Some(backup) = self.backup {
            wanted.insert("backup", Some(u8::from(backup).to_string()));
        }
        for (limit, keys) in [(self.iops, ["iops_rd", "iops_wr"]), (self.mbps, ["mbps_rd", "mbps_wr"])] {
            if let Some(limit) = limit {
                wanted.extend(keys.map(|key| (key, (limit > 0).then(|| limit.to_string()))));
            }
        }
        wanted
    }

    /// The parameters of a new volume with the changes, as its PV is to keep them.
    pub fn write_to(&self, parameters: &mut BTreeMap<String, String>) {
        let limits = [(self.iops, ["iops_rd", "iops_wr"]), (self.mbps, ["mbps_rd", "mbps_wr"])];
        for (limit, stray) in limits {
            if limit.is_some() {
                // They would win over what is changed.
                parameters.retain(|key, _| !stray.contains(&key.as_str()));
            }
        }
        parameters.extend(self.to_map());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn read(pairs: &[(&str, &str)]) -> Attributes {
        Attributes::parse(&map(pairs)).expect("legal attributes")
    }

    #[test]
    fn unknown_keys_and_values_that_mean_nothing_are_refused() {
        for (key, value) in [
            ("colour", "1"),
            ("cache", "none"),
            ("replicateSchedule", "*/15"),
            ("backup", "yes"),
            ("diskIOPS", ""),
            ("diskIOPS", "-1"),
            ("diskIOPS", "1e3"),
            ("diskMBps", "10,backup=1"),
            ("diskMBps", "4294967296"),
            ("backup,ssd=1", "1"),
        ] {
            assert!(Attributes::parse(&map(&[("diskIOPS", "7"), (key, value)])).is_err(), "{key}={value}");
            let known = Attributes::parse_known(&map(&[("diskMBps", "7"), (key, value)]));
            if key != "diskMBps" {
                assert_eq!(known, read(&[("diskMBps", "7")]), "{key}={value}");
            }
        }
    }

    #[test]
    fn a_change_leaves_what_it_does_not_name() {
        let first = read(&[("diskIOPS", "1000"), ("backup", "true")]);
        let both = first.changed_by(&read(&[("backup", "0"), ("diskMBps", "5")]));
        assert_eq!(both.to_map(), map(&[("backup", "false"), ("diskIOPS", "1000"), ("diskMBps", "5")]));
        assert_eq!(Attributes::parse(&both.to_map()), Ok(both));
    }

    #[test]
    fn zero_takes_a_limit_away() {
        let mut options = DriveOptions::default();
        read(&[("diskIOPS", "1000"), ("diskMBps", "5")]).apply_to(&mut options);
        read(&[("diskIOPS", "0")]).apply_to(&mut options);
        assert_eq!(options.limits, BTreeMap::from([("mbps_rd", 5), ("mbps_wr", 5)]));
        let drive = read(&[("diskIOPS", "0"), ("diskMBps", "5")]).of_drive();
        assert_eq!((&drive["iops_rd"], &drive["mbps_wr"]), (&None, &Some("5".to_owned())));
    }

    #[test]
    fn a_new_volume_keeps_the_changes_and_not_what_would_win_over_them() {
        let mut parameters = map(&[("diskIOPS", "1"), ("iops_rd", "2"), ("mbps_rd", "3"), ("storage", "s")]);
        read(&[("diskIOPS", "1000")]).write_to(&mut parameters);
        assert_eq!(parameters, map(&[("diskIOPS", "1000"), ("mbps_rd", "3"), ("storage", "s")]));
    }
}

//! Compares the compiled `csi.proto` with the facts of the interface, field by field and in both directions.
//!
//! Both sides become one flat, sorted list of lines such as `CreateVolumeRequest 5 secrets map<string, string> secret`;
//! what only one of them has is the failure. Read `differences` first.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message as _;
use proxmox_csi::csi::proto;
use serde_json::Value;

const FACTS: &str = include_str!("fixtures/csi-1.12.json");

/// The part of `descriptor.proto` the comparison needs.
///
/// `prost_types` drops extensions of options, and the secret mark is one; here it is a field like any other.
mod descriptor {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct FileSet {
        #[prost(message, repeated, tag = "1")]
        pub(crate) files: Vec<File>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct File {
        #[prost(string, optional, tag = "2")]
        pub(crate) package: Option<String>,
        #[prost(message, repeated, tag = "4")]
        pub(crate) messages: Vec<Message>,
        #[prost(message, repeated, tag = "5")]
        pub(crate) enums: Vec<Enum>,
        #[prost(message, repeated, tag = "6")]
        pub(crate) services: Vec<Service>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Message {
        #[prost(string, tag = "1")]
        pub(crate) name: String,
        #[prost(message, repeated, tag = "2")]
        pub(crate) fields: Vec<Field>,
        #[prost(message, repeated, tag = "3")]
        pub(crate) nested: Vec<Message>,
        #[prost(message, repeated, tag = "4")]
        pub(crate) enums: Vec<Enum>,
        #[prost(message, optional, tag = "7")]
        pub(crate) options: Option<MessageOptions>,
        #[prost(message, repeated, tag = "8")]
        pub(crate) oneofs: Vec<Oneof>,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(crate) struct MessageOptions {
        #[prost(bool, optional, tag = "7")]
        pub(crate) map_entry: Option<bool>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Oneof {
        #[prost(string, tag = "1")]
        pub(crate) name: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Field {
        #[prost(string, tag = "1")]
        pub(crate) name: String,
        #[prost(int32, tag = "3")]
        pub(crate) number: i32,
        /// 1 optional, 2 required, 3 repeated.
        #[prost(int32, tag = "4")]
        pub(crate) label: i32,
        #[prost(int32, tag = "5")]
        pub(crate) kind: i32,
        /// With a leading dot.
        #[prost(string, tag = "6")]
        pub(crate) type_name: String,
        #[prost(message, optional, tag = "8")]
        pub(crate) options: Option<FieldOptions>,
        #[prost(uint32, optional, tag = "9")]
        pub(crate) oneof: Option<u32>,
        #[prost(bool, optional, tag = "17")]
        pub(crate) proto3_optional: Option<bool>,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(crate) struct FieldOptions {
        #[prost(bool, optional, tag = "1059")]
        pub(crate) csi_secret: Option<bool>,
        #[prost(bool, optional, tag = "1060")]
        pub(crate) alpha_field: Option<bool>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Enum {
        #[prost(string, tag = "1")]
        pub(crate) name: String,
        #[prost(message, repeated, tag = "2")]
        pub(crate) values: Vec<EnumValue>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct EnumValue {
        #[prost(string, tag = "1")]
        pub(crate) name: String,
        #[prost(int32, tag = "2")]
        pub(crate) number: i32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Service {
        #[prost(string, tag = "1")]
        pub(crate) name: String,
        #[prost(message, repeated, tag = "2")]
        pub(crate) methods: Vec<Method>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Method {
        #[prost(string, tag = "1")]
        pub(crate) name: String,
        #[prost(string, tag = "2")]
        pub(crate) input: String,
        #[prost(string, tag = "3")]
        pub(crate) output: String,
        #[prost(bool, optional, tag = "5")]
        pub(crate) client_streaming: Option<bool>,
        #[prost(bool, optional, tag = "6")]
        pub(crate) server_streaming: Option<bool>,
    }
}

/// The lines of the compiled definition.
mod compiled {
    use super::descriptor::{Enum, Field, File, Message, Service};
    use super::{BTreeMap, BTreeSet};

    pub(crate) fn lines(file: &File) -> BTreeSet<String> {
        let package = file.package.clone().unwrap_or_default();
        let mut lines = BTreeSet::from([format!("package {package}")]);
        for service in &file.services {
            service_lines(service, &package, &mut lines);
        }
        for message in &file.messages {
            message_lines(message, "", &package, &mut lines);
        }
        for each in &file.enums {
            enum_lines(each, "", &mut lines);
        }
        lines
    }

    fn service_lines(service: &Service, package: &str, lines: &mut BTreeSet<String>) {
        lines.insert(format!("service {}", service.name));
        for method in &service.methods {
            let side = |streams: Option<bool>, name: &str| {
                format!("{}{name}", mark("stream ", streams.unwrap_or(false)))
            };
            let local = |name: &str| {
                name.strip_prefix(&format!(".{package}.")).map_or_else(|| name.to_owned(), str::to_owned)
            };
            lines.insert(format!(
                "rpc {}.{}({}) returns ({})",
                service.name,
                method.name,
                side(method.client_streaming, &local(&method.input)),
                side(method.server_streaming, &local(&method.output)),
            ));
        }
    }

    fn message_lines(message: &Message, outer: &str, package: &str, lines: &mut BTreeSet<String>) {
        let path = join(outer, &message.name);
        lines.insert(format!("message {path}"));
        // A map is a repeated message of two fields that the compiler makes up.
        let is_map = |nested: &&Message| nested.options.and_then(|o| o.map_entry).unwrap_or(false);
        let maps: BTreeMap<String, String> = message
            .nested
            .iter()
            .filter(is_map)
            .map(|entry| {
                let of = |number| {
                    entry.fields.iter().find(|f| f.number == number).map_or_else(String::new, type_of)
                };
                (format!(".{package}.{path}.{}", entry.name), format!("map<{}, {}>", of(1), of(2)))
            })
            .collect();
        for field in &message.fields {
            lines.insert(field_line(message, field, &path, &maps));
        }
        for nested in message.nested.iter().filter(|nested| !is_map(nested)) {
            message_lines(nested, &path, package, lines);
        }
        for each in &message.enums {
            enum_lines(each, &path, lines);
        }
    }

    fn field_line(message: &Message, field: &Field, path: &str, maps: &BTreeMap<String, String>) -> String {
        let map = maps.get(&field.type_name);
        let kind = map.cloned().unwrap_or_else(|| type_of(field));
        let oneof = field.oneof.map_or_else(String::new, |index| {
            let index = usize::try_from(index).expect("an index of a list in memory");
            format!(" oneof {}", message.oneofs[index].name)
        });
        let options = field.options.unwrap_or_default();
        format!(
            "{path} {} {} {}{kind}{oneof}{}{}{}{}",
            field.number,
            field.name,
            mark("repeated ", field.label == 3 && map.is_none()),
            mark(" required", field.label == 2),
            mark(" optional", field.proto3_optional.unwrap_or(false)),
            mark(" secret", options.csi_secret.unwrap_or(false)),
            mark(" alpha", options.alpha_field.unwrap_or(false)),
        )
    }

    fn enum_lines(each: &Enum, outer: &str, lines: &mut BTreeSet<String>) {
        let path = join(outer, &each.name);
        lines.insert(format!("enum {path}"));
        for value in &each.values {
            lines.insert(format!("{path} {} = {}", value.name, value.number));
        }
    }

    /// The type as `csi.proto` writes it; numbers are those of `FieldDescriptorProto.Type`.
    fn type_of(field: &Field) -> String {
        match field.kind {
            3 => "int64".to_owned(),
            5 => "int32".to_owned(),
            8 => "bool".to_owned(),
            9 => "string".to_owned(),
            11 | 14 => field.type_name.trim_start_matches('.').to_owned(),
            other => format!("type {other}"),
        }
    }

    fn join(outer: &str, name: &str) -> String {
        if outer.is_empty() { name.to_owned() } else { format!("{outer}.{name}") }
    }

    fn mark(word: &str, set: bool) -> &str {
        if set { word } else { "" }
    }
}

/// The lines of the facts.
mod facts {
    use super::{BTreeMap, BTreeSet, Value};

    pub(crate) fn lines(facts: &Value) -> BTreeSet<String> {
        let mut lines = BTreeSet::from([format!("package {}", text(facts, "package"))]);
        for (service, methods) in object(&facts["services"]) {
            lines.insert(format!("service {service}"));
            for (method, shape) in object(methods) {
                lines.insert(format!(
                    "rpc {service}.{method}({}{}) returns ({}{})",
                    mark("stream ", shape, "client_streaming"),
                    text(shape, "request"),
                    mark("stream ", shape, "server_streaming"),
                    text(shape, "response"),
                ));
            }
        }
        for (message, fields) in object(&facts["messages"]) {
            lines.insert(format!("message {message}"));
            for field in fields.as_array().expect("`messages` holds lists of fields") {
                let oneof = field["oneof"].as_str().map_or_else(String::new, |name| format!(" oneof {name}"));
                lines.insert(format!(
                    "{message} {} {} {}{}{oneof}{}{}",
                    field["number"],
                    text(field, "name"),
                    mark("repeated ", field, "repeated"),
                    text(field, "type"),
                    mark(" secret", field, "secret"),
                    mark(" alpha", field, "alpha"),
                ));
            }
        }
        for (name, values) in object(&facts["enums"]) {
            lines.insert(format!("enum {name}"));
            for (value, number) in object(values) {
                lines.insert(format!("{name} {value} = {number}"));
            }
        }
        lines
    }

    /// Messages with at least one secret field, and the numbers of those fields.
    pub(crate) fn secret_fields(facts: &Value) -> BTreeMap<String, BTreeSet<u64>> {
        let mut secret: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
        for (message, fields) in object(&facts["messages"]) {
            for field in fields.as_array().expect("`messages` holds lists of fields") {
                if field["secret"] == true {
                    let number = field["number"].as_u64().expect("a field has a number");
                    secret.entry(message.clone()).or_default().insert(number);
                }
            }
        }
        secret
    }

    fn object(value: &Value) -> &serde_json::Map<String, Value> {
        value.as_object().expect("an object in the facts")
    }

    fn text<'a>(value: &'a Value, key: &str) -> &'a str {
        value[key].as_str().expect("a text in the facts")
    }

    fn mark<'a>(word: &'a str, of: &Value, key: &str) -> &'a str {
        if of[key] == true { word } else { "" }
    }
}

/// What only one side has, `-` for a fact that the definition lacks and `+` for what no fact backs.
fn differences(facts: &BTreeSet<String>, compiled: &BTreeSet<String>) -> Vec<String> {
    let missing = facts.difference(compiled).map(|line| format!("- {line}"));
    let extra = compiled.difference(facts).map(|line| format!("+ {line}"));
    missing.chain(extra).collect()
}

fn read_facts() -> Value {
    serde_json::from_str(FACTS).expect("the fixture is JSON")
}

fn read_compiled() -> descriptor::File {
    let set = descriptor::FileSet::decode(proto::DESCRIPTOR).expect("build.rs wrote a descriptor set");
    let ours = |file: &descriptor::File| file.package.as_deref().is_some_and(|name| name.starts_with("csi"));
    let mut files: Vec<_> = set.files.into_iter().filter(ours).collect();
    assert_eq!(files.len(), 1, "one file defines the interface");
    files.remove(0)
}

#[test]
fn compiled_definition_is_the_interface_and_nothing_else() {
    let differences = differences(&facts::lines(&read_facts()), &compiled::lines(&read_compiled()));
    assert!(
        differences.is_empty(),
        "proto/csi.proto differs from tests/fixtures/csi-1.12.json\n(`-` missing, `+` extra):\n{}",
        differences.join("\n")
    );
}

#[test]
fn comparison_sees_every_kind_of_difference() {
    let facts = facts::lines(&read_facts());
    let pristine = read_compiled();
    let changed = |change: &dyn Fn(&mut descriptor::File)| {
        let mut file = pristine.clone();
        change(&mut file);
        differences(&facts, &compiled::lines(&file))
    };
    let create = pristine.messages.iter().position(|m| m.name == "CreateVolumeRequest").expect("it is there");
    let secrets =
        pristine.messages[create].fields.iter().position(|f| f.name == "secrets").expect("is there");
    let capability =
        pristine.messages.iter().position(|m| m.name == "VolumeCapability").expect("it is there");

    assert_eq!(changed(&|_| ()), [""; 0]);
    assert_eq!(
        changed(&|file| file.messages[create].fields[secrets].options = None),
        [
            "- CreateVolumeRequest 5 secrets map<string, string> secret",
            "+ CreateVolumeRequest 5 secrets map<string, string>",
        ],
        "a secret mark that is gone"
    );
    assert_eq!(
        changed(&|file| file.messages[capability].fields[0].oneof = None),
        [
            "- VolumeCapability 1 block csi.v1.VolumeCapability.BlockVolume oneof access_type",
            "+ VolumeCapability 1 block csi.v1.VolumeCapability.BlockVolume",
        ],
        "a field that left its oneof"
    );
    assert_eq!(
        changed(&|file| file.messages[create].fields[0].number = 9),
        ["- CreateVolumeRequest 1 name string", "+ CreateVolumeRequest 9 name string"],
        "another number"
    );
    assert_eq!(
        changed(&|file| file.enums[0].values[2].number = 3),
        ["- BlockMetadataType VARIABLE_LENGTH = 2", "+ BlockMetadataType VARIABLE_LENGTH = 3"],
        "another enum value"
    );
    assert_eq!(
        changed(&|file| {
            let metadata = file.services.iter_mut().find(|s| s.name == "SnapshotMetadata");
            metadata.expect("it is there").methods[0].server_streaming = None;
        }),
        [
            "- rpc SnapshotMetadata.GetMetadataAllocated(GetMetadataAllocatedRequest) \
             returns (stream GetMetadataAllocatedResponse)",
            "+ rpc SnapshotMetadata.GetMetadataAllocated(GetMetadataAllocatedRequest) \
             returns (GetMetadataAllocatedResponse)",
        ],
        "a stream that became a single answer"
    );
    assert_eq!(
        changed(&|file| {
            file.messages.push(descriptor::Message { name: "Extra".to_owned(), ..Default::default() });
        }),
        ["+ message Extra"],
        "a message of nobody's"
    );
}

/// `Debug` of each message with secrets, filled with one; the list is checked against the facts below.
macro_rules! debug_of_filled {
    ($($message:ident),* $(,)?) => {
        BTreeMap::from([$((
            stringify!($message).to_owned(),
            {
                let message = proto::$message { secrets: secret(), ..Default::default() };
                (format!("{message:?}"), format!("{message:#?}"), message.encode_to_vec())
            },
        )),*])
    };
}

const KEY: &str = "encryption-passphrase";
const SECRET: &str = "correct horse battery staple";

fn secret() -> BTreeMap<String, String> {
    BTreeMap::from([(KEY.to_owned(), SECRET.to_owned())])
}

#[test]
fn debug_of_a_request_shows_no_secret() {
    let shown = debug_of_filled!(
        ControllerExpandVolumeRequest,
        ControllerModifyVolumeRequest,
        ControllerPublishVolumeRequest,
        ControllerUnpublishVolumeRequest,
        CreateSnapshotRequest,
        CreateVolumeGroupSnapshotRequest,
        CreateVolumeRequest,
        DeleteSnapshotRequest,
        DeleteVolumeGroupSnapshotRequest,
        DeleteVolumeRequest,
        GetMetadataAllocatedRequest,
        GetMetadataDeltaRequest,
        GetSnapshotRequest,
        GetVolumeGroupSnapshotRequest,
        ListSnapshotsRequest,
        NodeExpandVolumeRequest,
        NodePublishVolumeRequest,
        NodeStageVolumeRequest,
        ValidateVolumeCapabilitiesRequest,
    );

    let secret_fields = facts::secret_fields(&read_facts());
    let with_secrets: BTreeSet<_> = secret_fields.keys().collect();
    assert_eq!(
        shown.keys().collect::<BTreeSet<_>>(),
        with_secrets,
        "the list above is not that of the facts"
    );
    for (message, fields) in &secret_fields {
        assert_eq!(fields.len(), 1, "`{message}` has a second secret field: fill it here too");
    }
    for (message, (line, pretty, bytes)) in &shown {
        let holds = |bytes: &[u8], text: &str| bytes.windows(text.len()).any(|part| part == text.as_bytes());
        assert!(holds(bytes, SECRET), "`{message}` was to be filled with a secret");
        for text in [line, pretty] {
            assert!(text.starts_with(message.as_str()), "`{message}` does not name itself: {text}");
            assert!(!text.contains(SECRET), "`{message}` shows a secret: {text}");
            assert!(!text.contains(KEY), "`{message}` shows the key of a secret: {text}");
        }
    }
}

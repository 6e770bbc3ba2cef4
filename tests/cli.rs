//! The command lines as a person meets them: help that teaches, errors that name the thing and the remedy, exit codes.

use std::{
    path::Path,
    process::{Command, Output},
};

fn run(arguments: &[&str]) -> Output {
    run_with(arguments, &[])
}

fn run_with(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_proxmox-csi"))
        .args(arguments)
        .env_remove("NODE_NAME")
        .env_remove("CSI_ENDPOINT")
        .env_remove("KUBECONFIG")
        .env_remove("RUST_LOG")
        .envs(environment.iter().copied())
        // clap wraps to the terminal; a fixed width keeps the snapshots.
        .env("COLUMNS", "120")
        .output()
        .expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("text")
}

#[track_caller]
fn assert_fails(arguments: &[&str], code: i32, names: &[&str]) {
    let output = run(arguments);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert!(output.stdout.is_empty(), "errors go to standard error");
    for name in names {
        assert!(error.contains(name), "`{name}` is not named in: {error}");
    }
}

fn write(directory: &Path, name: &str, text: &str) -> String {
    let path = directory.join(name);
    std::fs::write(&path, text).expect("a file");
    path.display().to_string()
}

const CONFIG: &str =
    "clusters: [{url: 'https://127.0.0.1:8006', token_id: csi@pve!csi, token_secret: s3cret, region: r1}]";
const NODES: &str = "nodes: [{name: w1, region: r1, uuid: 4daa5e68-83be-4e9d-9b71-8365c73aa16b}]";

#[test]
fn help_teaches() {
    for (name, arguments) in [
        ("help", vec!["--help"]),
        ("help_controller", vec!["controller", "--help"]),
        ("help_node", vec!["node", "--help"]),
        ("help_ccm", vec!["ccm", "--help"]),
        ("help_doctor", vec!["doctor", "--help"]),
        ("help_volumes", vec!["volumes", "--help"]),
        ("help_explain", vec!["explain", "--help"]),
    ] {
        let output = run(&arguments);
        assert!(output.status.success());
        insta::assert_snapshot!(name, text(&output.stdout));
    }
}

#[test]
fn a_bad_configuration_is_named_with_its_remedy() {
    let directory = tempfile::tempdir().expect("a directory");
    let nodes = write(directory.path(), "nodes.yaml", NODES);
    let fails = |config: &str, names: &[&str]| {
        let config = format!("--cloud-config={config}");
        assert_fails(&["controller", &config, &format!("--nodes={nodes}")], 3, names);
    };
    fails("/does/not/exist.yaml", &["/does/not/exist.yaml", "No such file"]);
    let config = |from: &str, to: &str| write(directory.path(), "config.yaml", &CONFIG.replace(from, to));
    fails(
        &config("https://127.0.0.1:8006", "http://127.0.0.1:8006"),
        &["http://127.0.0.1:8006", "https URL"],
    );
    fails(&config("token_secret: s3cret, ", ""), &["r1", "token_secret"]);
    fails(&config("region: r1", "region: r1, ca_file: /no/ca.pem"), &["/no/ca.pem"]);
    fails(&config("csi@pve!csi", "csi"), &["user@realm!name"]);
}

#[test]
fn a_bad_nodes_file_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let config = format!("--cloud-config={}", write(directory.path(), "config.yaml", CONFIG));
    let nodes = write(directory.path(), "nodes.yaml", "nodes: [{name: w1, region: r1, uuid: nonsense}]");
    assert_fails(&["controller", &config, &format!("--nodes={nodes}")], 3, &["nodes.yaml", "uuid"]);
    assert_fails(&["controller", &config], 3, &["--kubeconfig", "--nodes"]);
    assert_fails(&["controller", &config, "--kubeconfig=/no/file"], 3, &["/no/file"]);
    assert_fails(&["ccm", &config, "--kubeconfig=/no/file"], 3, &["/no/file"]);
}

#[test]
fn a_bad_socket_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let config = format!("--cloud-config={}", write(directory.path(), "config.yaml", CONFIG));
    let nodes = format!("--nodes={}", write(directory.path(), "nodes.yaml", NODES));
    let socket = format!("--csi-address=unix://{}", directory.path().join("csi.socket").display());
    assert_fails(&["controller", &config, &nodes, &socket], 3, &["csi.socket", ".sock"]);
}

#[test]
fn a_node_without_a_name_or_place_is_told_what_is_missing() {
    assert_fails(&["node", "--region=r1", "--zone=pve1"], 2, &["--node-id"]);
    assert_fails(&["node", "--node-id=w1", "--region=a/b", "--zone=pve1"], 2, &["--region", "label value"]);
    assert_fails(
        &["node", "--node-id=w1", "--region=r1", "--zone=pve1", "--max-volumes=0"],
        2,
        &["--max-volumes"],
    );
}

#[test]
fn a_tool_says_what_it_can_not_use() {
    let directory = tempfile::tempdir().expect("a directory");
    let config = format!("--cloud-config={}", write(directory.path(), "config.yaml", CONFIG));
    for tool in [&["doctor"][..], &["volumes"], &["explain", "r1//shared/x"]] {
        let fails = |more: &[&str], code, names: &[&str]| assert_fails(&[tool, more].concat(), code, names);
        fails(&["--cloud-config=/no/config.yaml"], 3, &["/no/config.yaml"]);
        fails(&[&config, "--kubeconfig=/no/file"], 3, &["/no/file"]);
        fails(&[&config, "--nodes=/no/nodes"], 3, &["/no/nodes"]);
        fails(&[&config, "--output=xml"], 2, &["xml", "json"]);
    }
    assert_fails(&["doctor", &config, "--ignore=nonsense"], 2, &["nonsense", "doctor --codes"]);
    assert_fails(&["doctor", &config, "--yes"], 2, &["--repair"]);
    assert_fails(&["explain", &config], 2, &["HANDLE"]);
}

#[test]
fn the_codes_of_findings_need_no_configuration() {
    let output = run(&["doctor", "--codes"]);
    assert_eq!(output.status.code(), Some(0));
    insta::assert_snapshot!("doctor_codes", text(&output.stdout));
    let json = run(&["doctor", "--codes", "-o", "json"]);
    assert!(text(&json.stdout).contains("\"code\": \"slot-dangling\""));
}

#[test]
fn the_socket_and_the_name_of_a_node_may_stand_in_the_environment() {
    // Both are understood before the socket's name is refused.
    let output = run_with(
        &["node", "--region=r1", "--zone=pve1"],
        &[("NODE_NAME", "w1"), ("CSI_ENDPOINT", "unix:///run/from-the-environment")],
    );
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{error}");
    assert!(error.contains("/run/from-the-environment"), "{error}");
    // A flag counts more.
    let output = run_with(
        &["node", "-node-id=w1", "--region=r1", "--zone=pve1", "-csi-address=unix:///run/from-the-flag"],
        &[("CSI_ENDPOINT", "unix:///run/from-the-environment")],
    );
    assert!(text(&output.stderr).contains("/run/from-the-flag"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_names_each_privilege_that_its_token_lacks_and_the_command_that_gives_it() {
    use proxmox_csi::sim::{Sim, World, http::Tls};

    let mut world = World::builtin();
    world.roles.get_mut("CSI").expect("the role").remove("Datastore.Allocate");
    let secret = world.token("csi@pve!csi").expect("the token").secret.clone();
    let sim = Sim::in_memory(world).expect("the world can be made");
    let tls = Tls::generate(&[]).expect("certificates");
    let server = sim.listen("127.0.0.1:0".parse().expect("an address"), &tls).await.expect("a port");
    let directory = tempfile::tempdir().expect("a directory");
    let config = write(
        directory.path(),
        "config.yaml",
        &format!(
            "clusters: [{{url: '{}', fingerprint: '{}', token_id: csi@pve!csi, token_secret: {secret}, region: r1}}]",
            server.url(),
            tls.fingerprint()
        ),
    );
    let nodes = write(directory.path(), "nodes.yaml", NODES);
    let (log, data) = (directory.path().join("log"), directory.path().join("data"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_proxmox-csi"))
        .args(["controller", &format!("--cloud-config={config}"), &format!("--nodes={nodes}")])
        .arg(format!("--csi-address=unix://{}", directory.path().join("csi.sock").display()))
        .env_remove("RUST_LOG")
        .stderr(std::fs::File::create(&log).expect("a file"))
        .stdout(std::fs::File::create(&data).expect("a file"))
        .spawn()
        .expect("the binary runs");
    let mut told = String::new();
    for _ in 0..200 {
        told = std::fs::read_to_string(&log).expect("the log");
        if told.contains("privileges checked") {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    child.kill().expect("it runs");
    child.wait().expect("it ends");
    let lines = |what: &str| told.lines().filter(|line| line.contains(what)).collect::<Vec<_>>();
    let [missing] = lines("a privilege is missing")[..] else { panic!("{told}") };
    for expected in [
        "WARN",
        "Datastore.Allocate",
        "path=\"/storage\"",
        "pveum role modify CSI -append 1 -privs Datastore.Allocate",
        "pveum acl modify /storage --tokens 'csi@pve!csi' --roles CSI",
    ] {
        assert!(missing.contains(expected), "`{expected}` is not in: {missing}");
    }
    assert_eq!(lines("an optional privilege is missing").len(), 2, "{told}");
    assert!(!told.contains(&secret));
    assert_eq!(std::fs::read_to_string(&data).expect("a file"), "", "logs go to standard error");
}

#[test]
fn a_driver_name_that_no_domain_has_is_refused() {
    for name in ["", "a_b", "-a", "a.", "a/b", &"a".repeat(64)] {
        let flag = format!("--driver-name={name}");
        assert_fails(&["node", "--node-id=w1", "--region=r1", "--zone=pve1", &flag], 2, &["--driver-name"]);
    }
    // A good one is taken, and the next thing is looked at.
    let flags = ["node", "--node-id=w1", "--region=r1", "--zone=pve1", "--csi-address=x"];
    assert_fails(&[&flags[..], &["--driver-name=csi.Example-1.org"]].concat(), 3, &[".sock"]);
}

#[test]
fn only_the_endpoint_is_taken_from_a_variable_of_the_interface() {
    for command in ["controller", "node", "ccm"] {
        let help = text(&run(&[command, "--help"]).stdout);
        let variables = help.split("[env: ").skip(1).filter_map(|rest| rest.split(['=', ']']).next());
        for variable in variables {
            assert!(variable == "CSI_ENDPOINT" || !variable.starts_with("CSI_"), "{command}: {variable}");
        }
    }
}

#[test]
fn every_flag_and_variable_is_in_the_reference() {
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let documents = std::fs::read_to_string(reference).expect("the reference");
    let help = text(&run(&["--help"]).stdout);
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let commands =
        commands.take_while(|line| !line.is_empty()).filter_map(|line| line.split_whitespace().next());
    let mut flags = 0;
    for command in commands.filter(|name| *name != "help") {
        for line in text(&run(&[command, "--help"]).stdout).lines() {
            let named = line.trim_start();
            let flag = named.split([' ', ',', '=']).find(|word| word.starts_with("--"));
            if let Some(flag) = flag.filter(|_| {
                named.starts_with('-') && !["--help", "--version"].iter().any(|own| named.contains(own))
            }) {
                flags += 1;
                assert!(
                    documents.contains(&format!("`{flag}`")),
                    "`{flag}` of `{command}` is not in the reference"
                );
            }
            if let Some((_, variable)) = line.split_once("[env: ") {
                let variable = variable.split('=').next().expect("a name");
                assert!(documents.contains(&format!("`{variable}`")), "{variable} is not in the reference");
            }
        }
    }
    assert!(flags > 30, "{flags}");
}

//! Alerts and dashboard: rules by promtool, and every query of the dashboard by a real Prometheus that has scraped a real run.

use std::{net::TcpListener, path::Path, process::Command, time::Duration};

use serde_json::{Value, json};

use crate::{
    helm::{path, text},
    kubernetes::Process,
    life::{Life, claim},
    rig::until_within,
};

fn promtool(arguments: &[&str]) -> (bool, String) {
    let output = Command::new("promtool")
        .args(arguments)
        .output()
        .expect("promtool runs: Debian's package `prometheus`");
    (output.status.success(), text(&output.stdout) + &text(&output.stderr))
}

/// A port that nobody listens on.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

#[test]
fn alerts_fire_when_they_should_and_not_otherwise() {
    let rules = path("deploy/chart/files/alerts.yaml").display().to_string();
    let (is_well, said) = promtool(&["check", "rules", &rules]);
    assert!(is_well, "{said}");
    let (is_well, said) =
        promtool(&["test", "rules", &path("tests/deploy/alerts.yaml").display().to_string()]);
    assert!(is_well, "{said}");
    // Each alert has a test in which it is named.
    let tests = std::fs::read_to_string(path("tests/deploy/alerts.yaml")).expect("tests");
    let rules = std::fs::read_to_string(rules).expect("rules");
    for alert in rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        assert!(tests.matches(alert).count() > 1, "no test for {alert}");
    }
}

/// The queries of the dashboard, with the interval that Grafana would fill in.
fn queries() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(
        &std::fs::read_to_string(path("deploy/chart/files/dashboard.json")).expect("a file"),
    )
    .expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let all: Vec<String> = panels
        .iter()
        .flat_map(|panel| panel["targets"].as_array().expect("targets"))
        .map(|target| target["expr"].as_str().expect("text").replace("$__rate_interval", "20s"))
        .collect();
    assert!(all.len() > 15, "{all:?}");
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn no_query_of_the_dashboard_is_empty_after_a_real_run() {
    let life = Life::start().await;
    life.rig.cluster.apply("tests/fixtures/rbac-ccm.yaml").await;
    life.node("w101", 101).await;
    let (controller, ccm, prometheus) = (free_port(), free_port(), free_port());
    let _pod = life.pod_with_metrics("csi-a", &format!("127.0.0.1:{controller}")).await;
    let _ccm = life.rig.ccm("ccm", &[&format!("--metrics-address=127.0.0.1:{ccm}")]).await;
    let directory = life.rig.cluster.directory();
    let config = json!({"global": {"scrape_interval": "1s"}, "scrape_configs": [{"job_name": "proxmox-csi",
        "static_configs": [{"targets": [format!("127.0.0.1:{controller}"), format!("127.0.0.1:{ccm}")]}]}]});
    std::fs::write(directory.join("prometheus.yaml"), config.to_string()).expect("written");
    let _prometheus = Process::start(
        "prometheus",
        Path::new("/usr/bin/prometheus"),
        [
            "--config.file=prometheus.yaml",
            "--storage.tsdb.path=tsdb",
            &format!("--web.listen-address=127.0.0.1:{prometheus}"),
        ],
        directory,
    )
    .expect("it starts")
    .quiet();
    let url = format!("http://127.0.0.1:{prometheus}");
    let scraped = async || promtool(&["query", "instant", &url, "count(up == 1) == 2"]).1.contains("=> 2");
    until_within(Duration::from_mins(2), "both are scraped", scraped).await;

    // Something happens, again and again: volumes come, are attached and go.
    let mut round = 0;
    let mut empty = queries();
    let started = tokio::time::Instant::now();
    while !empty.is_empty() {
        assert!(started.elapsed() < Duration::from_mins(3), "still empty: {empty:#?}");
        round += 1;
        life.attached(&claim(&format!("data-{round}"), "proxmox-data-immediate")).await;
        // What is asked is what a person would look at now: all queries are to have an answer at one time.
        empty = queries()
            .into_iter()
            .filter(|query| {
                let (is_well, said) = promtool(&["query", "instant", &url, query]);
                assert!(is_well, "{query}: {said}");
                // Quantiles of what has not happened lately are no numbers.
                !said.lines().any(|line| line.contains("=>") && !line.contains("=> NaN"))
            })
            .collect();
    }
    println!("no query is empty after {round} volumes");
}

//! Load: hundreds of volumes at once, at the latencies and with the locks and workers that were recorded.

mod support;

use std::time::Duration;

use support::load::load;

#[tokio::test(start_paused = true)]
async fn five_hundred_volumes_at_once_run_into_no_deadline_and_leave_room_for_a_person() {
    let report = load(500, 20).await;
    assert!(report.timeouts.is_empty() && report.errors.is_empty(), "{report:#?}");
    // No more than the limits of the configuration allow, and they are used.
    assert_eq!(report.most, (6, 4), "{report:#?}");
    assert!(report.asked > 500, "{report:#?}");
    assert!(report.person.0 < Duration::from_millis(100), "{report:#?}");
}

use std::collections::BTreeSet;

use super::*;

/// Where families are registered, each with a line of its own.
const SOURCES: [&str; 8] = [
    include_str!("admission.rs"),
    include_str!("engines.rs"),
    include_str!("kv_events.rs"),
    include_str!("kv_moves.rs"),
    include_str!("observe.rs"),
    include_str!("operation.rs"),
    include_str!("requests.rs"),
    include_str!("workers.rs"),
];

/// Names as the text format shows them, each family touched once.
fn published_names() -> BTreeSet<String> {
    let metrics = Metrics::new();
    metrics.http_response("/live", 200);
    let _connection = metrics.connection("http");
    let worker = metrics.worker("w0", 16, 100);
    worker.report(1, 2, 0.5);
    let engine = metrics.engines.engine("http://a:1");
    engine.report(true, "closed");
    let _events = metrics.kv_events.worker("w0");
    let cache = metrics.kv_events.cache("w0");
    cache.completed(1, Some(1), Some(1.0));
    let text = metrics.encode().unwrap();
    let counters = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    counters
        .map(|line| match line.split_once(' ').unwrap() {
            (name, "counter") => format!("{name}_total"),
            (name, "info") => format!("{name}_info"),
            (name, _) => name.to_owned(),
        })
        .collect()
}

#[test]
fn each_metric_has_its_row_in_the_docs_and_each_row_its_metric() {
    let documented: BTreeSet<String> = include_str!("../../../../docs/metrics.md")
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter_map(|line| line.split(['`', '{']).next())
        .map(str::to_owned)
        .collect();
    assert_eq!(published_names(), documented);
}

#[test]
fn the_test_above_touches_every_family() {
    let rows = ["r.register(\"", "r.register_with_unit(\"", "seconds(\""];
    let registered: usize = SOURCES
        .iter()
        .flat_map(|source| rows.iter().map(|row| source.matches(row).count()))
        .sum();
    assert_eq!(published_names().len(), registered);
}

#[test]
fn a_worker_s_series_go_when_it_detaches() {
    let metrics = Metrics::new();
    let worker = metrics.worker("w\"0\n", 16, 100);
    worker.report(3, 0, 0.25);
    let text = metrics.encode().unwrap();
    assert!(text.contains("orchestra_workers 1\n"), "{text}");
    assert!(
        text.contains(r#"orchestra_kv_cache_usage_ratio{worker="w\"0\n"} 0.25"#),
        "{text}"
    );
    drop(worker);
    let text = metrics.encode().unwrap();
    assert!(!text.contains("worker="), "{text}");
    assert!(text.contains("orchestra_workers 0\n"), "{text}");
}

#[test]
fn gauges_count_back_down() {
    let metrics = Metrics::new();
    let guard = InFlight::new(&metrics.requests_running);
    assert_eq!(metrics.requests_running.get(), 1);
    drop(guard);
    assert_eq!(metrics.requests_running.get(), 0);
}

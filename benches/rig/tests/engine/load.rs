use std::time::Duration;

use orchestra_rig::{
    engine::{EngineConfig, Kind},
    load::{Errors, LoadConfig, Report, run},
};
use serde_json::json;

use crate::support::{Rig, config};

/// Twenty requests that ask for six words each.
async fn load(rig: &Rig, streams: bool) -> Report {
    load_of(rig, streams, 0).await
}

async fn load_of(rig: &Rig, streams: bool, distinct: u64) -> Report {
    let config = LoadConfig {
        targets: vec![rig.address],
        model: "mock".to_owned(),
        streams,
        body_bytes: 2000,
        prefixes: 2,
        prefix_bytes: None,
        distinct,
        words: 6,
        concurrency: 3,
        count: Some(20),
        duration: Duration::from_secs(60),
        checks: true,
        seed: 1,
        timeout: Duration::from_secs(30),
    };
    // The load brings its own threads and runtimes.
    tokio::task::spawn_blocking(|| run(config, 2))
        .await
        .unwrap()
        .unwrap()
}

#[tokio::test]
async fn a_sound_engine_has_no_errors() {
    let rig = Rig::start(config(Kind::Vllm));
    for streams in [false, true] {
        let report = load(&rig, streams).await;
        assert_eq!((report.requests, report.errors), (20, Errors::default()));
        assert!(report.latency_us.p50 > 0.0);
        // A role, six words and the end.
        assert_eq!(report.events, if streams { 20 * 8 } else { 0 });
    }
}

#[tokio::test]
async fn prompts_come_again_where_they_are_to() {
    let rig = Rig::start(config(Kind::Vllm));
    let mut bodies = Vec::new();
    for distinct in [1, 1, 0] {
        load_of(&rig, false, distinct).await;
        let last = String::from_utf8(rig.engine.control().last()).unwrap();
        bodies.push(last.split_once("\r\n\r\n").unwrap().1.to_owned());
    }
    assert_eq!(bodies[0], bodies[1]);
    assert_ne!(bodies[0], bodies[2]);
}

#[tokio::test]
async fn each_fault_is_counted_as_what_it_is() {
    let rig = Rig::start(config(Kind::Vllm));
    for fault in [
        json!({"fault": "fin"}),
        json!({"fault": "status", "status": 503, "count": 2}),
        json!({"fault": "early_end", "after_events": 1, "count": 3}),
    ] {
        rig.arm(fault);
    }
    let expected = Errors {
        broken: 1,
        status: 2,
        unfinished: 3,
        ..Errors::default()
    };
    assert_eq!(load(&rig, true).await.errors, expected);
}

#[tokio::test]
async fn a_word_that_is_missing_is_wrong() {
    let rig = Rig::start(EngineConfig {
        words: 5,
        ..config(Kind::Vllm)
    });
    for streams in [false, true] {
        let errors = load(&rig, streams).await.errors;
        assert_eq!(
            errors,
            Errors {
                wrong_words: 20,
                ..Errors::default()
            }
        );
    }
}

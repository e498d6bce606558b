use std::{sync::atomic::Ordering, time::Duration};

use orchestra_rig::{
    engine::{EngineConfig, Kind},
    words,
};
use serde_json::{Value, json};

use crate::support::{ASKED, CHAT, Rig, TEXT, answer, chat, config, receive, send};

#[tokio::test]
async fn whole_and_streamed_answers_say_the_same() {
    let rig = Rig::start(config(Kind::Vllm));
    let (status, whole) = rig.post(CHAT, chat(&json!({"max_tokens": 4}))).await;
    assert_eq!(status, 200);
    assert_eq!(
        whole["choices"][0]["message"]["content"],
        json!(answer(0..4))
    );
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 4);
    let streamed = rig.stream(CHAT, chat(&json!({}))).await;
    assert_eq!(
        (streamed.0, streamed.1.as_deref()),
        (answer(0..6), Some("stop"))
    );
    assert!(streamed.2.is_ok());
}

#[tokio::test]
async fn words_can_come_several_to_an_event() {
    let rig = Rig::start(EngineConfig {
        words_per_event: 4,
        ..config(Kind::Vllm)
    });
    let (said, finish, _) = rig.stream(CHAT, chat(&json!({"max_tokens": 5}))).await;
    assert_eq!((said, finish.as_deref()), (answer(0..5), Some("length")));
    // A fault after one event comes after four words.
    rig.arm(json!({"fault": "fin", "after_events": 1}));
    assert_eq!(rig.stream(CHAT, chat(&json!({}))).await.0, answer(0..4));
}

#[tokio::test]
async fn an_answer_goes_on_where_a_prompt_ends_in_it() {
    let rest = |body: Value| async move {
        let rig = Rig::start(config(Kind::Vllm));
        let path = if body["prompt"].is_null() { CHAT } else { TEXT };
        (
            rig.stream(path, body).await.0,
            rig.engine
                .control()
                .counters
                .continued
                .load(Ordering::Relaxed),
        )
    };
    let messages = json!([
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": answer(0..3)},
    ]);
    let flags = json!({"messages": messages, "continue_final_message": true, "add_generation_prompt": false});
    assert_eq!(rest(chat(&flags)).await, (answer(3..6), 1));
    let asked = String::from_utf8(ASKED.to_vec()).unwrap();
    let text = json!({"model": "mock", "seed": 7, "prompt": asked + &answer(0..2)});
    assert_eq!(rest(text).await, (answer(2..6), 1));
    let mut ids = words::ids_of_text(ASKED);
    ids.extend((0..5).map(|index| words::word_id(words::key(ASKED, 7, 0), index)));
    assert_eq!(
        rest(json!({"model": "mock", "seed": 7, "prompt": ids})).await,
        (answer(5..6), 1)
    );
}

#[tokio::test]
async fn each_kind_continues_in_its_own_way() {
    let messages =
        json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer(0..3)}]);
    let body = chat(&json!({"messages": messages}));
    for (kind, continues) in [
        (Kind::Vllm, false),
        (Kind::LlamaCpp, true),
        (Kind::Plain, false),
    ] {
        let rig = Rig::start(config(kind));
        let (said, ..) = rig.stream(CHAT, body.clone()).await;
        assert_eq!(said == answer(3..6), continues, "{kind:?}");
        let (status, _) = rig.post(TEXT, json!({"prompt": [1, 2, 3]})).await;
        assert_eq!(status == 200, kind != Kind::Plain, "{kind:?}");
    }
}

#[tokio::test]
async fn ids_of_prompt_and_answer_are_returned() {
    let rig = Rig::start(config(Kind::Vllm));
    let (_, whole) = rig
        .post(CHAT, chat(&json!({"return_token_ids": true})))
        .await;
    let prompt: Vec<u32> = serde_json::from_value(whole["prompt_token_ids"].clone()).unwrap();
    let said: Vec<u32> = serde_json::from_value(whole["choices"][0]["token_ids"].clone()).unwrap();
    assert_eq!(words::text_of_ids(&prompt).unwrap(), ASKED);
    assert_eq!(words::text_of_ids(&said).unwrap(), answer(0..6).as_bytes());
}

#[tokio::test]
async fn choices_usage_logprobs_and_cached_tokens_have_their_shapes() {
    let rig = Rig::start(config(Kind::Vllm));
    let long = json!([{"role": "user", "content": "long ".repeat(100)}]);
    let body = chat(&json!({"messages": long, "n": 2, "logprobs": true}));
    let (_, first) = rig.post(CHAT, body.clone()).await;
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(first["usage"]["completion_tokens"], 12);
    assert_ne!(
        first["choices"][0]["message"],
        first["choices"][1]["message"]
    );
    assert_eq!(
        first["choices"][1]["logprobs"]["content"]
            .as_array()
            .unwrap()
            .len(),
        6
    );
    let (_, second) = rig.post(CHAT, body).await;
    assert_eq!(
        second["usage"]["prompt_tokens_details"]["cached_tokens"],
        160
    );
}

#[tokio::test]
async fn bad_input_is_refused() {
    let rig = Rig::start(EngineConfig {
        max_concurrency: 0,
        ..config(Kind::Vllm)
    });
    assert_eq!(
        rig.post(CHAT, chat(&json!({"model": "other"}))).await.0,
        404
    );
    assert_eq!(rig.post(CHAT, json!({"messages": []})).await.0, 400);
    assert_eq!(
        rig.post(CHAT, chat(&json!({"max_tokens": 9999}))).await.0,
        400
    );
    // Too many at once is the only thing wrong with this one.
    assert_eq!(rig.post(CHAT, chat(&json!({}))).await.0, 429);
}

#[tokio::test]
async fn faults_mid_stream_do_what_they_say() {
    let rig = Rig::start(config(Kind::Vllm));
    for fault in [
        "reset",
        "fin",
        "garbage_chunk",
        "truncated",
        "early_end",
        "garbage",
        "slow",
    ] {
        rig.arm(json!({"fault": fault, "after_events": 2, "itl_ms": 1}));
        let (said, finish, ended) = rig.stream(CHAT, chat(&json!({}))).await;
        let (words, finishes, ends) = match fault {
            "reset" | "fin" | "garbage_chunk" | "truncated" => (answer(0..2), false, false),
            "early_end" => (answer(0..2), false, true),
            "garbage" => (answer(0..2) + &answer(3..6), true, true),
            _ => (answer(0..6), true, true),
        };
        // After a reset the kernel drops what was not read yet.
        let as_said = if fault == "reset" {
            words.starts_with(&said)
        } else {
            said == words
        };
        assert!(as_said, "{fault}: {said}");
        assert_eq!(
            (finish.is_some(), ended.is_ok()),
            (finishes, ends),
            "{fault}"
        );
    }
    assert_eq!(rig.stream(CHAT, chat(&json!({}))).await.0, answer(0..6));
}

#[tokio::test]
async fn faults_before_the_head_do_what_they_say() {
    let rig = Rig::start(config(Kind::Vllm));
    for fault in ["reset", "fin"] {
        rig.arm(json!({"fault": fault}));
        let mut connection = rig.connect().await;
        send(&mut connection, CHAT, &chat(&json!({}))).await;
        assert!(receive(&mut connection).await.is_err(), "{fault}");
    }
    rig.arm(json!({"fault": "status", "status": 503, "count": 2}));
    let mut connection = rig.connect().await;
    for expected in [503, 503, 200] {
        send(&mut connection, CHAT, &chat(&json!({}))).await;
        assert_eq!(receive(&mut connection).await.unwrap().0, expected);
    }
    rig.arm(json!({"fault": "garbage_json"}));
    send(&mut connection, CHAT, &chat(&json!({}))).await;
    let (status, body) = receive(&mut connection).await.unwrap();
    assert_eq!(status, 200);
    assert!(serde_json::from_slice::<Value>(&body).is_err());
}

#[tokio::test]
async fn a_client_that_leaves_is_noticed() {
    let paced = EngineConfig {
        ttft: Duration::from_millis(1),
        ..config(Kind::Vllm)
    };
    let rig = Rig::start(EngineConfig {
        itl: Duration::from_secs(60),
        ..paced
    });
    for (left, fault) in [None, Some("hang_headers"), Some("hang_stream")]
        .into_iter()
        .enumerate()
    {
        if let Some(fault) = fault {
            rig.arm(json!({"fault": fault}));
        }
        let mut connection = rig.connect().await;
        send(&mut connection, CHAT, &chat(&json!({"stream": true}))).await;
        let counters = &rig.engine.control().counters;
        while counters.running.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        drop(connection);
        while counters.client_gone.load(Ordering::Relaxed) == left as u64 {
            tokio::task::yield_now().await;
        }
    }
    let report: Value = serde_json::from_slice(&rig.engine.control().report()).unwrap();
    assert_eq!(report["client_gone_unix_ms"].as_array().unwrap().len(), 3);
    assert_eq!(report["completed"], 0);
    assert_eq!(rig.serving.len(), 1);
}

#[tokio::test]
async fn a_fault_can_come_in_the_middle_of_a_stream() {
    let paced = EngineConfig {
        ttft: Duration::from_millis(1),
        ..config(Kind::Vllm)
    };
    let rig = Rig::start(paced);
    rig.arm(json!({"fault": "reset", "now": true}));
    // It waits for a stream; a whole answer is none.
    assert_eq!(rig.post(CHAT, chat(&json!({}))).await.0, 200);
    assert!(rig.stream(CHAT, chat(&json!({}))).await.2.is_err());
    assert!(rig.stream(CHAT, chat(&json!({}))).await.2.is_ok());
}

#[tokio::test]
async fn what_is_held_is_answered_when_it_is_let_go() {
    let rig = Rig::start(config(Kind::Vllm));
    rig.arm(json!({"fault": "hold"}));
    let mut connection = rig.connect().await;
    send(&mut connection, CHAT, &chat(&json!({}))).await;
    let counters = &rig.engine.control().counters;
    while counters.faults.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    // One that was not held is answered before it.
    assert_eq!(rig.post(CHAT, chat(&json!({}))).await.0, 200);
    assert_eq!(counters.completed.load(Ordering::Relaxed), 1);
    rig.engine.control().disarm();
    assert_eq!(receive(&mut connection).await.unwrap().0, 200);
}

#[tokio::test]
async fn the_last_request_is_kept_byte_for_byte() {
    let rig = Rig::start(config(Kind::Sglang));
    let body = chat(&json!({"unknown": [1.50, "é"]}));
    rig.post(CHAT, body.clone()).await;
    let last = rig.engine.control().last();
    assert!(last.ends_with(format!("\r\n\r\n{body}").as_bytes()));
}

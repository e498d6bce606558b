use proptest::prelude::*;

use super::*;
use crate::metrics::Metrics;

fn said(text: &str, finish_reason: Option<&str>) -> Value {
    json!({
        "id": "second", "object": "chat.completion.chunk", "created": 2, "model": "n",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}],
    })
}

/// A memory of text that the first engine sent.
fn memory(text: &str) -> Memory {
    let mut memory = Memory::new(1);
    let event = json!({
        "id": "first", "created": 1, "model": "m",
        "choices": [{"index": 0, "delta": {"content": text}}],
    });
    memory
        .take(event.to_string().as_bytes(), &Metrics::new())
        .unwrap();
    memory
}

fn splice(text: &str, stop: &[&str]) -> Splice {
    let stop: Vec<_> = stop.iter().map(|&text| text.to_owned()).collect();
    Splice::new(Route::Chat, &memory(text), &stop)
}

fn text(event: &Value) -> &str {
    event["choices"][0]["delta"]["content"]
        .as_str()
        .unwrap_or_default()
}

#[test]
fn a_continuation_has_the_names_of_the_first_part_and_no_second_beginning() {
    let mut splice = splice("a", &[]);
    let role = json!({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]});
    assert_eq!(splice.event(role.to_string().as_bytes()), Spliced::Nothing);
    let Spliced::Data(event) = splice.event(said("b", None).to_string().as_bytes()) else {
        panic!("nothing")
    };
    assert_eq!(
        (&event["id"], &event["created"], &event["model"]),
        (&json!("first"), &json!(1), &json!("m"))
    );
    assert_eq!(text(&event), "b");
    let end = said("", Some("stop")).to_string();
    assert!(matches!(splice.event(end.as_bytes()), Spliced::Data(_)));
}

#[test]
fn usage_is_that_of_both_parts() {
    let mut splice = splice("a", &[]);
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}});
    let Spliced::Data(event) = splice.event(usage.to_string().as_bytes()) else {
        panic!("nothing")
    };
    let expected = json!({"prompt_tokens": 10, "completion_tokens": 6, "total_tokens": 16});
    assert_eq!(event["usage"], expected);
}

#[test]
fn a_stop_string_is_found_where_the_parts_meet() {
    let mut cut = splice("abc <en", &["<end>"]);
    let Spliced::Stopped(event) = cut.event(said("d> more", None).to_string().as_bytes()) else {
        panic!("not found")
    };
    assert_eq!(
        (text(&event), &event["choices"][0]["finish_reason"]),
        ("", &json!("stop"))
    );

    let mut other = splice("abc <en", &["<end>"]);
    let Spliced::Data(event) = other.event(said("tity>", None).to_string().as_bytes()) else {
        panic!("nothing")
    };
    assert_eq!(text(&event), "tity>");
}

#[test]
fn odd_events_are_dropped_and_do_not_panic() {
    let mut splice = splice("a", &["x"]);
    for odd in [
        "[]",
        "1",
        "{}",
        "{\"choices\": 3}",
        "{\"choices\": [3]}",
        "{\"choices\": [{\"delta\": 3}]}",
        "nope",
    ] {
        assert_eq!(splice.event(odd.as_bytes()), Spliced::Nothing, "{odd}");
    }
}

proptest! {
    /// Cut anywhere, the text that a client gets is what one undisturbed stream would have given, but for the beginning of
    /// a stop string that was out already.
    #[test]
    fn nothing_is_lost_or_doubled(
        whole in "[ab]{0,12}",
        cuts in proptest::collection::vec(0_usize..13, 1..4),
        stop in "[ab]{2,3}",
    ) {
        let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(whole.len())).collect();
        cuts.sort_unstable();
        let first = &whole[..cuts[0]];
        prop_assume!(!first.contains(&stop));
        let mut splice = splice(first, &[&stop]);
        let (mut got, mut is_stopped) = (first.to_owned(), false);
        let length = whole.len();
        let ends = cuts.iter().skip(1).chain([&length]);
        for (begin, end) in cuts.iter().zip(ends) {
            let is_last = *end == whole.len();
            let event = said(&whole[*begin..*end], is_last.then_some("length")).to_string();
            match splice.event(event.as_bytes()) {
                Spliced::Data(event) => got.push_str(text(&event)),
                Spliced::Stopped(event) => {
                    got.push_str(text(&event));
                    is_stopped = true;
                    break;
                }
                Spliced::Nothing => {}
            }
            if is_last {
                break;
            }
        }
        let found = whole.find(&stop);
        let expected = found.map_or(&whole[..], |at| &whole[..at.max(first.len())]);
        prop_assert_eq!((&got[..], is_stopped), (expected, found.is_some()));
    }
}

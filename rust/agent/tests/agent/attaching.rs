//! How a worker comes to a router.

use std::net::TcpListener;

use orchestra_proto::v1::{
    ModelFiles, Welcome, router_message::Message as Down, worker_message::Message as Up,
};

use crate::support::{Engine, FakeRouter, collect, config, eventually, start};

#[test]
fn hello_comes_first_and_model_files_follow_the_welcome() {
    let mut router = FakeRouter::start();
    let config = config(router.address);
    let digest = config.model_files.digest();
    let engine = Engine::start(config);

    let mut session = router.accept();
    let hello = session.hello();
    assert_eq!(
        (hello.worker_id.as_str(), hello.model.as_str()),
        ("worker-1", "demo")
    );
    assert_eq!((hello.weights_epoch, hello.vocab_size), (3, 1000));
    assert_eq!((hello.block_size, hello.num_blocks), (4, 64));
    assert_eq!((hello.max_num_seqs, hello.max_model_len), (8, 128));
    assert_eq!((hello.eos_token_ids, hello.block_hashes), (vec![2], vec![]));
    assert_eq!(hello.model_files_digest, digest);
    assert!(!engine.agent.is_attached(), "not before the welcome");

    session.send(Down::Welcome(Welcome {
        wants_model_files: true,
    }));
    let files = ModelFiles {
        tokenizer_json: b"{}".to_vec(),
        chat_template: "{{ messages }}".to_owned(),
        ..ModelFiles::default()
    };
    assert_eq!(session.next(), Some(Up::ModelFiles(files)));
    assert!(matches!(session.next(), Some(Up::Load(_))));
    eventually("attached", || engine.agent.is_attached());
    engine.close();
}

#[test]
fn a_router_that_has_the_files_gets_a_load_report_at_once() {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    let Some(Up::Load(load)) = session.next() else {
        panic!("a load report comes first");
    };
    assert_eq!((load.kv_blocks_used, load.kv_blocks_total), (0, 64));
    engine.close();
}

#[test]
fn a_worker_that_starts_before_its_router_waits_for_it() {
    let closed_door = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = closed_door.local_addr().unwrap();
    let engine = Engine::start(config(address));
    // Whatever answers there is no router yet.
    for _ in 0..3 {
        drop(closed_door.accept().unwrap());
    }
    drop(closed_door);

    let mut router = FakeRouter::start_at(address);
    let (mut session, _) = router.welcome();
    session.send(Down::Start(start(1, 5, 3)));
    assert_eq!(collect(&mut session, &[1])[&1].token_ids.len(), 3);
    engine.close();
}

#[test]
fn a_router_that_does_not_welcome_is_left() {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let mut session = router.accept();
    session.hello();
    session.send(Down::Start(start(1, 5, 3)));

    let (mut session, _) = router.welcome();
    session.send(Down::Start(start(1, 5, 3)));
    assert_eq!(collect(&mut session, &[1])[&1].token_ids.len(), 3);
    engine.close();
}

#[test]
fn reports_go_on_while_a_step_executes() {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    engine.hold();
    session.send(Down::Start(start(1, 5, 3)));
    engine.wait_until_held();

    let running = |message| match message {
        Up::Load(load) if load.num_running == 1 => Some(load.steps),
        _ => None,
    };
    let steps: Vec<u64> = (0..5).map(|_| session.wait_for(running)).collect();
    assert_eq!(steps, [1; 5], "the count of a hung step stands still");

    engine.release();
    collect(&mut session, &[1]);
    let idle = |message| match message {
        Up::Load(load) if load.num_running == 0 => Some(load),
        _ => None,
    };
    let load = session.wait_for(idle);
    assert_eq!(load.steps, 3);
    assert!(load.execute_us > 0);
    engine.close();
}

//! Managers, pools and their peers, each figure beside what physics or the kernel sets as its limit here:
//! `cargo bench -p orchestra-memory --bench managers -- [pools|registrations|slabs|defragment|foreground|
//! peers …] [shm|tcp|nixl …]`.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a bench prints, and fails by panicking"
)]

mod churned;
mod defragment;
mod foreground;
mod node;
mod peers;
mod pools;
mod registrations;
mod slabs;

#[path = "../transfers/limits.rs"]
#[allow(
    dead_code,
    reason = "shared with the bench of transfers, which uses more of it"
)]
mod limits;
#[path = "../../tests/registrations/owners.rs"]
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
mod owners;
#[path = "../../peer/rig.rs"]
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
mod rig;

/// The middle one.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The value that this share of them does not exceed.
fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * share) as usize]
}

const KINDS: [&str; 3] = ["shm", "tcp", "nixl"];

/// The parts and the transports that the command line asks for.
fn asked() -> Vec<String> {
    let arguments = std::env::args().skip(1);
    arguments.filter(|argument| argument != "--bench").collect()
}

/// Those that are asked for and can be had; where none is asked for, all that can be had.
fn transports() -> impl Iterator<Item = &'static str> {
    let asked = asked();
    let is_asked = move |kind: &str| asked.iter().any(|asked| asked == kind);
    let are_all = !KINDS.iter().any(|kind| is_asked(kind));
    KINDS
        .into_iter()
        .filter(move |kind| (are_all || is_asked(kind)) && rig::is_installed(kind))
}

fn main() {
    let mut asked = asked();
    if let [first, kind] = asked.as_slice()
        && first == node::PEER
    {
        return node::serve(kind);
    }
    asked.retain(|asked| !KINDS.contains(&asked.as_str()));
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load {}", load.trim_end());
    let parts: [(&str, fn()); 6] = [
        ("pools", pools::measure),
        ("registrations", registrations::measure),
        ("slabs", slabs::measure),
        ("defragment", defragment::measure),
        ("foreground", foreground::measure),
        ("peers", peers::measure),
    ];
    for (name, measure) in parts {
        if asked.is_empty() || asked.iter().any(|asked| asked == name) {
            measure();
        }
    }
}

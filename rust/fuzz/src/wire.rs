//! What a worker may send a router, and a client either of them.

use orchestra_proto::v1::{GenerateRequest, RouterMessage, WorkerMessage};
use prost::Message;

/// Whatever can be read is the same after it was written and read again.
pub fn wire(data: &[u8]) {
    same_again::<WorkerMessage>(data);
    same_again::<RouterMessage>(data);
    same_again::<GenerateRequest>(data);
}

fn same_again<M: Message + Default>(data: &[u8]) {
    let Ok(message) = M::decode(data) else {
        return;
    };
    // Not the values: a NaN differs from itself.
    let written = message.encode_to_vec();
    let again = M::decode(&*written).map(|message| message.encode_to_vec());
    assert_eq!(again.ok(), Some(written));
}

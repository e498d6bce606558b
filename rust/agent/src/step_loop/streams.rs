//! The step loop and its attachment: announcing the worker, telling what changed, and letting go.

use orchestra_core::ErrorCode;
use orchestra_proto::v1::{self, worker_message::Message};

use super::{KvLink, StepLoop};
use crate::{
    attachment::{Attachment, Lost},
    config::Role,
    error::AgentError,
    outputs,
};

impl StepLoop {
    /// Announces the worker on a new stream. The snapshot and every event after it go through the same queue, and the
    /// events before it are part of it: nothing is lost or told twice.
    pub(super) fn attach(&mut self, attachment: Attachment) {
        self.detach(Lost::Ended);
        drop(self.scheduler.take_kv_events());
        let limits = &self.config.scheduler;
        let hello = v1::WorkerHello {
            worker_id: self.config.worker_id.clone(),
            model: self.config.model.clone(),
            weights_epoch: self.config.weights_epoch,
            block_size: limits.block_size,
            num_blocks: limits.num_blocks,
            max_num_seqs: limits.max_num_seqs,
            max_model_len: limits.max_model_len,
            model_files_digest: self.model_files_digest.clone(),
            eos_token_ids: limits.eos_token_ids.clone(),
            block_hashes: outputs::wire(&self.scheduler.cached_block_hashes()),
            vocab_size: self.config.vocab_size,
            kv_transfer: self.kv.as_ref().map(KvLink::announcement),
            role: wire_role(self.config.role).into(),
            num_host_blocks: limits.num_host_blocks,
            host_block_hashes: outputs::wire(&self.scheduler.kept_block_hashes()),
        };
        let hello = v1::WorkerMessage {
            message: Some(Message::Hello(hello)),
        };
        let sent = attachment.send(hello, &self.patience);
        if let Some(kv) = &self.kv {
            kv.attached(&attachment);
        }
        self.attachment = Some(attachment);
        self.keep_or_detach(sent);
    }

    /// Forgets the attachment and aborts its sequences: whoever wants them replays them elsewhere.
    pub(super) fn detach(&mut self, lost: Lost) {
        let Some(attachment) = self.attachment.take() else {
            return;
        };
        let aborted = self.scheduler.abort_all().len();
        if let Some(kv) = &mut self.kv {
            kv.detached();
        }
        self.board.update(|stats| {
            stats.outbound_stalls += u64::from(lost == Lost::Stalled);
            stats.aborted_by_detach += aborted as u64;
            stats.set_scheduler(self.scheduler.stats());
        });
        match lost {
            Lost::Stalled => {
                attachment.cut();
                let limit = self.patience.limit;
                tracing::warn!(?limit, aborted, "router reads too slowly, stream dropped");
            }
            Lost::Ended if aborted > 0 => tracing::warn!(aborted, "stream lost, sequences aborted"),
            Lost::StartedOver => tracing::warn!(aborted, "starting over, sequences aborted"),
            Lost::Ended | Lost::Closing => {}
        }
    }

    pub(super) fn keep_or_detach(&mut self, sent: Result<(), Lost>) {
        if let Err(lost) = sent {
            self.detach(lost);
        }
    }

    pub(super) fn send_kv_events(&mut self) {
        // Without an attachment they are dropped: the next hello tells the whole cache.
        let events = self.scheduler.take_kv_events();
        let sent = self.attachment.as_mut().map_or(Ok(()), |attachment| {
            attachment.send_kv_events(events, &self.patience)
        });
        self.keep_or_detach(sent);
    }

    pub(crate) fn fail(&mut self, message: &str) {
        if self.failure.is_some() {
            return;
        }
        tracing::error!(
            worker_id = self.config.worker_id,
            "step failed, the agent gives up"
        );
        self.failure = Some(message.to_owned());
        self.outstanding = None;
        if let Some(attachment) = &mut self.attachment {
            attachment.refuse_all(ErrorCode::WorkerFailed, message);
            // Where that fails the stream has ended, and the router knows.
            let _ = attachment.send_refusals(&self.patience);
        }
        self.detach(Lost::Ended);
        self.patience.closing.cancel();
    }

    /// Lets go of everything computed so far, of its sequences and of the router, which replays them elsewhere, or here
    /// once the next `next_step` announces the worker anew: with an empty cache, and under a stream that nobody
    /// remembers a failure of.
    pub(crate) fn start_over(&mut self) -> Result<(), AgentError> {
        self.check_usable()?;
        self.outstanding = None;
        self.detach(Lost::StartedOver);
        self.scheduler.forget_all();
        // Nobody is attached to hear of it, and the next hello tells the cache as it is.
        drop(self.scheduler.take_kv_events());
        self.board
            .update(|stats| stats.set_scheduler(self.scheduler.stats()));
        Ok(())
    }

    pub(crate) fn close(&mut self) {
        self.outstanding = None;
        self.detach(Lost::Closing);
    }
}

const fn wire_role(role: Role) -> v1::WorkerRole {
    match role {
        Role::Both => v1::WorkerRole::Unspecified,
        Role::Prefill => v1::WorkerRole::Prefill,
        Role::Decode => v1::WorkerRole::Decode,
    }
}

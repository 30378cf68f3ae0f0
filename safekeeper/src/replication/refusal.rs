//! What clients are told when something is not to be had: `ErrorResponse`s.

use pgwire::messages::response::ErrorResponse;
use types::Lsn;

/// What an `ErrorResponse` says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(super) struct Refusal {
    /// Five characters.
    pub sqlstate: &'static str,
    /// What happened.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// Where slots, base backups and SQL are to be had.
const ASK_THE_COMPUTE: &str =
    "Connect to the branch's own endpoint for that, whose host `dormouse connection-string` prints.";

impl Refusal {
    pub fn new(sqlstate: &'static str, message: impl Into<String>) -> Refusal {
        Refusal { sqlstate, message: message.into(), hint: None }
    }

    pub fn with_hint(self, hint: impl Into<String>) -> Refusal {
        Refusal { hint: Some(hint.into()), ..self }
    }

    /// Safekeepers can't do this, computes can.
    pub fn unsupported(what: &str) -> Refusal {
        Refusal::new("0A000", format!("{what} is not supported by safekeepers")).with_hint(ASK_THE_COMPUTE)
    }

    /// A slot is named where none can be.
    pub fn slot() -> Refusal {
        let hint = "Take primary_slot_name out of the standby's settings, or -S from pg_receivewal's arguments. A slot that is made at \
                    the branch's own endpoint keeps WAL here too.";
        Refusal::new("0A000", "replication slots are not supported by safekeepers").with_hint(hint)
    }

    /// This safekeeper can't serve the branch at present; another may. libpq tries its next host upon this.
    pub fn not_here(reason: impl Into<String>) -> Refusal {
        Refusal::new("57P03", reason)
    }

    pub fn too_many_connections(limit: usize) -> Refusal {
        Refusal::not_here(format!("there are {limit} connections for replication already"))
            .with_hint("The safekeeper's --replication-connections says how many there may be.")
    }

    pub fn deleted() -> Refusal {
        Refusal::new("3D000", "the branch has been deleted")
    }

    /// The WAL at this position is gone, in Postgres's words.
    pub fn removed(position: Lsn) -> Refusal {
        let segment = position.segment_file_name();
        let hint = "Take it from an archive (restore_command), or make the standby anew. A replication slot at the branch's own \
                    endpoint keeps WAL for standbys that have to wait.";
        Refusal::new("58P01", format!("requested WAL segment {segment} has already been removed")).with_hint(hint)
    }

    pub fn stopping() -> Refusal {
        Refusal::new("57P01", "terminating connection: the safekeeper is stopping")
    }

    pub fn protocol(message: impl Into<String>) -> Refusal {
        Refusal::new("08P01", message)
    }

    /// The message; after an `ERROR` the connection goes on, after `FATAL` it ends.
    pub fn response(&self, severity: &str) -> ErrorResponse {
        let mut fields = vec![
            (b'S', severity.to_owned()),
            (b'V', severity.to_owned()),
            (b'C', self.sqlstate.to_owned()),
            (b'M', text(&self.message)),
        ];
        fields.extend(self.hint.as_ref().map(|hint| (b'H', text(hint))));
        ErrorResponse::new(fields)
    }
}

/// A zero inside would end the text early: it is left out.
fn text(text: &str) -> String {
    text.replace('\0', "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_in_postgres_words() {
        let gone = Refusal::removed(Lsn(0x0150_0028));
        assert_eq!(gone.message, "requested WAL segment 000000010000000000000001 has already been removed");
        let fields = gone.response("FATAL").fields;
        assert_eq!(fields[..3].iter().map(|(_, text)| text.as_str()).collect::<Vec<_>>(), ["FATAL", "FATAL", "58P01"]);
        assert!(fields.iter().any(|(kind, _)| *kind == b'H'));
        assert_eq!(Refusal::protocol("a\0b").response("ERROR").fields[3].1, "ab");
    }
}

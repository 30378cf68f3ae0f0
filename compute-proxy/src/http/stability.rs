//! Whether a query's answer may be kept: it must only read, and call nothing volatile. Postgres itself says so: it prints the
//! query as it is after views and policies were put in, with every function in it, and is then asked about these. Pure.

use std::{collections::BTreeSet, fmt::Write as _};

use connection_pool::frame;

/// What has Postgres print each query that it analyses to the client, and nothing else.
pub const BEGIN_PRINTING: [&str; 3] =
    ["BEGIN READ ONLY", "SET LOCAL client_min_messages = log", "SET LOCAL debug_print_rewritten = on"];

/// Ends printing within the transaction.
pub const END_PRINTING: &str = "SET LOCAL debug_print_rewritten = off";

/// The first message text of what is printed.
const TITLE: &[u8] = b"rewritten parse tree:";

/// Ids of the first object that `initdb` did not make (`FirstNormalObjectId`): types below it are Postgres's own.
const FIRST_OWN_TYPE: u32 = 16_384;

/// What a query calls, as Postgres's printed trees tell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Calls {
    functions: BTreeSet<u32>,
    operators: BTreeSet<u32>,
    /// Types whose values may be read or written as text: types of extensions bring functions for that.
    types: BTreeSet<u32>,
    trees: usize,
    /// Something that is no plain reading was found.
    changes: bool,
}

impl Calls {
    /// Takes a message to the client, if it is a printed tree.
    pub fn take_notice(&mut self, body: &[u8]) {
        let field = |wanted| frame::error_fields(body).find(|(kind, _)| *kind == wanted).map(|(_, text)| text);
        if field(b'M') == Some(TITLE)
            && let Some(tree) = field(b'D')
        {
            self.take_tree(&String::from_utf8_lossy(tree));
        }
    }

    /// Takes a printed tree. What is not understood counts against the query.
    fn take_tree(&mut self, tree: &str) {
        self.trees += 1;
        let mut words = tree.split_ascii_whitespace().map(|word| word.trim_start_matches(['(', '{']));
        let mut before = "";
        while let Some(word) = words.next() {
            let value = || word.trim_end_matches([')', '}']);
            match before {
                ":commandType" => self.changes |= value() != "1",
                ":hasModifyingCTE" | ":hasForUpdate" => self.changes |= value() != "false",
                ":funcid" | ":opfuncid" | ":hashfuncid" | ":negfuncid" | ":aggfnoid" | ":winfnoid" | ":tsmhandler" => {
                    self.functions.extend(value().parse::<u32>().ok().filter(|id| *id != 0));
                }
                ":opno" | ":eqop" | ":sortop" => {
                    self.operators.extend(value().parse::<u32>().ok().filter(|id| *id != 0));
                }
                // A list: `(o 1 2)`.
                ":opnos" => {
                    let mut rest = word;
                    loop {
                        self.operators.extend(rest.trim_end_matches([')', '}']).parse::<u32>().ok());
                        if rest.contains(')') {
                            break;
                        }
                        let Some(next) = words.next() else { break };
                        rest = next;
                    }
                }
                key if key.starts_with(':') && key.ends_with("type") => {
                    self.types.extend(value().parse::<u32>().ok().filter(|id| *id >= FIRST_OWN_TYPE));
                }
                _ => {}
            }
            self.changes |= value() == "NEXTVALUEEXPR";
            before = word;
        }
    }

    /// Asks whether nothing that the query calls is volatile; the answer is one row with one `t` or `f`. `None`: it does not
    /// only read, so nothing need be asked.
    pub fn question(&self) -> Option<String> {
        if self.changes || self.trees != 1 {
            return None;
        }
        let mut text =
            "SELECT NOT EXISTS (SELECT FROM pg_catalog.pg_proc p WHERE p.provolatile OPERATOR(pg_catalog.=) 'v' \
                        AND (p.oid OPERATOR(pg_catalog.=) ANY ("
                .to_owned();
        write_ids(&mut text, &self.functions);
        text.push_str(
            ") OR p.oid OPERATOR(pg_catalog.=) ANY (SELECT o.oprcode::pg_catalog.oid FROM pg_catalog.pg_operator o WHERE o.oid \
             OPERATOR(pg_catalog.=) ANY (",
        );
        write_ids(&mut text, &self.operators);
        text.push_str(
            ")) OR p.oid OPERATOR(pg_catalog.=) ANY (SELECT pg_catalog.unnest(ARRAY[t.typinput::pg_catalog.oid, \
             t.typoutput::pg_catalog.oid]) FROM pg_catalog.pg_type t WHERE t.oid OPERATOR(pg_catalog.=) ANY (",
        );
        write_ids(&mut text, &self.types);
        text.push_str("))))");
        Some(text)
    }
}

/// `'{1,2}'::oid[]`.
fn write_ids(text: &mut String, ids: &BTreeSet<u32>) {
    text.push_str("'{");
    for (index, id) in ids.iter().enumerate() {
        let comma = if index > 0 { "," } else { "" };
        // Writing to a String cannot fail.
        let _ = write!(text, "{comma}{id}");
    }
    text.push_str("}'::pg_catalog.oid[]");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn calls(tree: &str) -> Calls {
        let mut calls = Calls::default();
        calls.take_tree(tree);
        calls
    }

    #[test]
    fn what_is_called_is_found() {
        let tree = "(\n   {QUERY \n   :commandType 1 \n :hasModifyingCTE false :hasForUpdate false :targetList (\n {TARGETENTRY \
                    :expr {FUNCEXPR :funcid 1598 :funcresulttype 701 :args <>} :resname :funcid\\ 9} {OPEXPR :opno 96 \
                    :opfuncid 65 :opresulttype 16400} {ROWCOMPAREEXPR :opnos (o 664 97)} {SORTGROUPCLAUSE :eqop 98 :sortop \
                    0} {AGGREF :aggfnoid 2803})})";
        let found = calls(tree);
        assert_eq!(found.functions, [65, 1598, 2803].into());
        assert_eq!(found.operators, [96, 97, 98, 664].into());
        assert_eq!(found.types, [16_400].into());
        let question = found.question().expect("it only reads");
        assert!(question.contains("'{65,1598,2803}'") && question.contains("'{96,97,98,664}'"), "{question}");
    }

    #[test]
    fn what_does_not_only_read_is_not_asked_about() {
        for tree in [
            "({QUERY :commandType 2 :hasForUpdate false})",
            "({QUERY :commandType 6})",
            "({QUERY :commandType 1 :hasModifyingCTE true})",
            "({QUERY :commandType 1 :hasForUpdate true})",
            "({QUERY :commandType 1 :rtable ({QUERY :commandType 3})})",
            "({QUERY :commandType 1 :x {NEXTVALUEEXPR :seqid 1}})",
            "({QUERY :commandType",
        ] {
            let found = calls(tree);
            assert!(found.question().is_none() || tree.ends_with("Type"), "{tree}");
        }
        assert_eq!(Calls::default().question(), None, "nothing was printed");
        let mut two = calls("({QUERY :commandType 1})");
        two.take_tree("({QUERY :commandType 1})");
        assert_eq!(two.question(), None, "a rule has made two of it");
    }

    #[test]
    fn only_printed_trees_are_taken() {
        let mut calls = Calls::default();
        calls.take_notice(b"SNOTICE\0Mhello\0D({QUERY :commandType 1})\0\0");
        assert_eq!(calls, Calls::default());
        calls.take_notice(b"SLOG\0Mrewritten parse tree:\0D({QUERY :commandType 1 :funcid 7})\0\0");
        assert_eq!(calls.functions, [7].into());
    }

    proptest! {
        #[test]
        fn garbage_never_panics(text in "[:a-z(){} 0-9o]{0,60}", bytes: Vec<u8>) {
            let mut calls = Calls::default();
            calls.take_tree(&text);
            calls.take_notice(&bytes);
            let _ = calls.question();
        }
    }
}

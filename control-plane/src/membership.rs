//! Brings every branch to the safekeepers that the installation is to have, one step of one branch at a time.
//!
//! What is wanted (`safekeepers`) and how far each timeline has come (`memberships`) is in the store; nothing else is remembered, so
//! that this goes on after a restart where it was. The rules are in docs/safekeeper-protocol.md.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures::future::join_all;
use types::{BranchRef, Member, Membership, NodeId};

use crate::{
    app::App,
    problem::Problem,
    store::{
        branches::{self, BranchRow},
        memberships::{self, MembershipRow},
    },
};

/// How soon a branch that is on its way is looked at again.
const SOON: Duration = Duration::from_millis(300);
/// How often it is looked whether there is anything to do when nobody has said so, and how soon a safekeeper that does not answer is
/// tried again.
const LATER: Duration = Duration::from_secs(15);

/// What is to be done next for one timeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Store this membership, which begins a change or takes one back.
    Store(Membership),
    /// Bring the new members, of whom these were none before, up to what is committed under the joint membership; then complete it.
    CarryOver(Vec<NodeId>),
    /// Tell everybody whom it concerns.
    Tell,
    /// Nothing.
    Nothing,
}

/// What brings a timeline nearer to these members.
pub fn next_step(row: &MembershipRow, wanted: &[Member]) -> Step {
    let nodes = |members: &[Member]| members.iter().map(|member| member.node).collect::<BTreeSet<NodeId>>();
    let (membership, wanted_nodes) = (&row.membership, nodes(wanted));
    match &membership.new_members {
        Some(new) if nodes(new) == wanted_nodes => {
            let before = nodes(&membership.members);
            Step::CarryOver(wanted_nodes.difference(&before).copied().collect())
        }
        // Somebody has changed their mind.
        Some(_) => Step::Store(membership.abandoned()),
        None if nodes(&membership.members) != wanted_nodes => {
            membership.joint_with(wanted.to_vec()).map_or(Step::Nothing, Step::Store)
        }
        None if !row.is_told => Step::Tell,
        None => Step::Nothing,
    }
}

/// Goes on until it is aborted.
pub async fn run(app: Arc<App>) {
    loop {
        let pause = match round(&app).await {
            Ok(Progress::Made) => SOON,
            Ok(Progress::None) => LATER,
            Err(error) => {
                tracing::warn!(%error, "changing branches' safekeepers");
                LATER
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = app.safekeepers_changed.notified() => {}
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Made,
    None,
}

/// One step of each branch that needs one.
async fn round(app: &App) -> Result<Progress, Problem> {
    let (rows, wanted) = app.store.call(|db| Ok((memberships::all(db)?, memberships::wanted(db)?))).await?;
    let mut progress = Progress::None;
    for row in rows {
        let step = next_step(&row, &wanted);
        if step == Step::Nothing {
            continue;
        }
        let timeline = row.timeline.clone();
        // One that is being made or deleted is not moved.
        let Some(branch) = app.store.call(move |db| branches::of_timeline(db, &timeline)).await? else { continue };
        match take(app, &branch, &row, step).await {
            Ok(()) => progress = Progress::Made,
            Err(error) => {
                tracing::warn!(branch = %branch.branch, membership = %row.membership, %error, "changing a branch's safekeepers");
                let (timeline, generation) = (row.timeline.clone(), row.membership.generation);
                let trouble = error.to_string();
                let noted = move |db: &rusqlite::Connection| {
                    memberships::note(db, &timeline, generation, false, Some(&trouble))
                };
                app.store.call(noted).await?;
            }
        }
    }
    app.store.call(memberships::forget_left).await?;
    Ok(progress)
}

async fn take(app: &App, branch: &BranchRow, row: &MembershipRow, step: Step) -> Result<(), Problem> {
    match step {
        Step::Store(membership) => store(app, &branch.timeline, membership).await,
        Step::CarryOver(new) => carry_over(app, branch, &row.membership, &new).await,
        Step::Tell => tell_everybody(app, branch, &row.membership).await,
        Step::Nothing => Ok(()),
    }
}

async fn store(app: &App, timeline: &BranchRef, membership: Membership) -> Result<(), Problem> {
    tracing::info!(%timeline, %membership, "a branch's safekeepers change");
    let timeline = timeline.branch.clone();
    app.store.call(move |db| memberships::store(db, &timeline, &membership)).await
}

/// A step on the way to the new members: they hear of the joint membership, and everything committed is brought to them.
async fn carry_over(app: &App, branch: &BranchRow, joint: &Membership, new: &[NodeId]) -> Result<(), Problem> {
    let told = tell(app, branch, joint, &joint.all()).await;
    if let Some((member, error)) = told.into_iter().find(|(member, _)| new.contains(&member.node)) {
        return Err(Problem::Unavailable(format!("safekeeper {} is to become a member: {error}", member.node)));
    }
    if !app.computes.carry_over(branch, joint, new).await? {
        return Ok(());
    }
    store(app, &branch.timeline, joint.completed()).await?;
    tell_everybody(app, branch, &joint.completed()).await
}

/// Tells members, those that are leaving, and the compute. An error when somebody did not answer: it is tried again.
async fn tell_everybody(app: &App, branch: &BranchRow, membership: &Membership) -> Result<(), Problem> {
    let timeline = branch.timeline.branch.clone();
    let everybody = app.store.call(move |db| memberships::everybody(db, &timeline)).await?;
    app.computes.tell_membership(&branch.branch, membership).await?;
    if let Some((member, error)) = tell(app, branch, membership, &everybody).await.into_iter().next() {
        return Err(Problem::Unavailable(format!("telling safekeeper {}: {error}", member.node)));
    }
    let (timeline, generation) = (branch.timeline.branch.clone(), membership.generation);
    app.store.call(move |db| memberships::note(db, &timeline, generation, true, None)).await
}

/// Tells safekeepers; those that could not be told.
async fn tell(app: &App, branch: &BranchRow, membership: &Membership, to: &[Member]) -> Vec<(Member, Problem)> {
    let telling = to.iter().map(|member| async move {
        let told = app.storage.tell_membership(&branch.timeline, member, membership).await;
        told.err().map(|error| (member.clone(), error))
    });
    join_all(telling).await.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use types::{BranchId, MembershipGeneration};

    use super::*;

    fn members(nodes: &[u64]) -> Vec<Member> {
        nodes.iter().map(|node| Member { node: NodeId(*node), address: format!("host:{node}") }).collect()
    }

    fn row(membership: Membership, is_told: bool) -> MembershipRow {
        MembershipRow { timeline: BranchId::new("b").expect("id"), membership, is_told, trouble: None }
    }

    #[test]
    fn a_change_goes_from_joint_to_final_to_told() {
        let first = Membership::first(members(&[1, 2, 3]));
        let wanted = members(&[2, 3, 4]);
        assert_eq!(next_step(&row(first.clone(), true), &first.members), Step::Nothing);
        let Step::Store(joint) = next_step(&row(first, true), &wanted) else { panic!("no change begins") };
        assert_eq!((joint.generation, joint.new_members.as_ref()), (MembershipGeneration(2), Some(&wanted)));
        assert_eq!(next_step(&row(joint.clone(), false), &wanted), Step::CarryOver(vec![NodeId(4)]));
        let last = joint.completed();
        assert_eq!(next_step(&row(last.clone(), false), &wanted), Step::Tell);
        assert_eq!(next_step(&row(last, true), &wanted), Step::Nothing);
    }

    #[test]
    fn a_change_of_mind_takes_a_change_back_first() {
        let joint = Membership::first(members(&[1, 2, 3])).joint_with(members(&[1, 2, 4])).expect("joint");
        let Step::Store(back) = next_step(&row(joint, false), &members(&[1, 2, 5])) else { panic!("it goes on") };
        assert_eq!(back, Membership { generation: MembershipGeneration(3), ..Membership::first(members(&[1, 2, 3])) });
    }
}

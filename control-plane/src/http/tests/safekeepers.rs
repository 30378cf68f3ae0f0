//! Branches go over to other safekeepers.

use control_plane_api::compute::MembershipProgress;

use super::*;

impl World {
    /// The timeline of a branch that is awake, and its endpoint's path.
    async fn timeline(&self) -> (BranchRef, String) {
        let made = self.project().await;
        let project = text(&made["project"]["id"]);
        let branch = text(&made["branch"]["id"]).parse().expect("id");
        let endpoint = format!("/projects/{project}/endpoints/{}", text(&made["endpoints"][0]["id"]));
        (BranchRef { project: project.parse().expect("id"), branch }, endpoint)
    }

    /// Waits until a safekeeper was told of a branch's membership of this generation.
    async fn told(&self, branch: &BranchRef, node: u64, generation: u64) -> Membership {
        let waited = async {
            loop {
                let told = self.storage.told.lock().get(&(branch.clone(), NodeId(node))).cloned();
                if let Some(membership) = told.filter(|told| told.generation == MembershipGeneration(generation)) {
                    return membership;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), waited).await.expect("told in time")
    }
}

#[tokio::test]
async fn a_sleeping_branch_goes_over_to_other_safekeepers() {
    let world = World::new().await;
    let (timeline, endpoint) = world.timeline().await;
    world.post(&format!("{endpoint}/suspend"), Value::Null).await;
    world.storage.slow.lock().insert(NodeId(4));
    let fourth = json!({ "id": 4, "address": "sk4:1" });
    let (status, answer) = world.api(Method::POST, "/safekeepers/3/replace", fourth.clone()).await;
    assert_eq!((status, &answer["safekeepers"][2]["state"]), (200, &json!("leaving")), "{answer}");
    let joint = world.told(&timeline, 4, 2).await;
    assert_eq!(joint.to_string(), "2: 1,2,3 and 1,2,4");
    tokio::time::sleep(Duration::from_millis(700)).await;
    let (_, answer) = world.api(Method::GET, "/safekeepers", Value::Null).await;
    assert_eq!(answer["branches"]["changing"], 1, "the fourth lacks WAL: {answer}");
    let listed = answer["safekeepers"].as_array().and_then(|all| all.iter().find(|one| one["id"] == 4));
    assert_eq!(listed.expect("listed")["trouble"], "write: no space left on device", "{answer}");
    assert!(world.storage.carried.lock().iter().all(|(_, membership)| *membership == joint));

    world.storage.slow.lock().clear();
    assert_eq!(world.told(&timeline, 3, 3).await.to_string(), "3: 1,2,4");
    world.post(&format!("{endpoint}/start"), Value::Null).await;
    let waked = async {
        while world.computes.specs.lock().len() < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), waked).await.expect("awake");
    let given = world.computes.specs.lock().iter().map(|spec| spec.membership.to_string()).collect::<Vec<_>>();
    assert_eq!(given, ["1: 1,2,3", "3: 1,2,4"]);
    let forgotten = async {
        loop {
            let (_, answer) = world.api(Method::GET, "/safekeepers", Value::Null).await;
            if answer["branches"]["changing"] == 0 && answer["safekeepers"].as_array().is_some_and(|all| all.len() == 3)
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), forgotten).await.expect("who has left is not listed any more");
    assert_eq!(world.api(Method::POST, "/safekeepers", fourth).await.0, 409, "it is there already");
    assert_eq!(world.api(Method::DELETE, "/safekeepers/3", Value::Null).await.0, 404);
}

#[tokio::test]
async fn a_running_compute_takes_its_branch_to_other_safekeepers() {
    let world = World::new().await;
    let (timeline, _) = world.timeline().await;
    let progress = |generation, lagging: &[u64]| MembershipProgress {
        generation: MembershipGeneration(generation),
        established: true,
        lagging: lagging.iter().copied().map(NodeId).collect(),
    };
    *world.computes.membership.lock() = Some(progress(2, &[3, 4]));
    world.api(Method::POST, "/safekeepers", json!({ "id": 4, "address": "sk4:1" })).await;
    world.told(&timeline, 4, 2).await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert!(world.computes.told.lock().iter().all(|told| told.to_string() == "2: 1,2,3 and 1,2,3,4"));
    assert_eq!(world.storage.carried.lock().len(), 0, "nobody else stands for election");
    *world.computes.membership.lock() = Some(progress(2, &[3]));
    world.told(&timeline, 4, 3).await;
    assert_eq!(world.computes.told.lock().last().map(ToString::to_string), Some("3: 1,2,3,4".to_owned()));
}

#[tokio::test]
async fn a_new_safekeeper_that_does_not_answer_holds_nobody_up() {
    let world = World::new().await;
    let (timeline, endpoint) = world.timeline().await;
    world.post(&format!("{endpoint}/suspend"), Value::Null).await;
    world.storage.silent.lock().insert(NodeId(4));
    world.api(Method::POST, "/safekeepers", json!({ "id": 4, "address": "sk4:1" })).await;
    world.told(&timeline, 1, 2).await;
    let (_, answer) = world.api(Method::GET, "/safekeepers", Value::Null).await;
    assert_eq!(answer["branches"]["changing"], 1);
    assert_eq!(world.storage.carried.lock().len(), 0, "no election is held in vain");
    // It is given up again: the change is taken back.
    world.api(Method::DELETE, "/safekeepers/4", Value::Null).await;
    assert_eq!(world.told(&timeline, 1, 3).await.to_string(), "3: 1,2,3");
    let (status, _) = world.api(Method::DELETE, "/safekeepers/4", Value::Null).await;
    assert_eq!(status, 200, "it will not come back to be told");
}

#[tokio::test]
async fn a_safekeeper_that_was_away_deletes_a_branch_later() {
    let world = World::new().await;
    let made = world.project().await;
    let project = text(&made["project"]["id"]);
    let child = world.post(&format!("/projects/{project}/branches"), json!({ "branch": { "name": "child" } })).await;
    let id = text(&child["branch"]["id"]);
    let timeline = BranchRef { project: project.parse().expect("id"), branch: id.parse().expect("id") };
    let has_deleted = |node| world.storage.deleted.lock().contains(&(timeline.clone(), NodeId(node)));
    world.storage.silent.lock().insert(NodeId(2));
    let (status, answer) = world.api(Method::DELETE, &format!("/projects/{project}/branches/{id}"), Value::Null).await;
    assert_eq!(status, 200, "{answer}");
    assert!(has_deleted(1) && has_deleted(3));
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!has_deleted(2));

    world.storage.silent.lock().clear();
    let waited = async {
        while !has_deleted(2) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), waited).await.expect("asked again");
    world.storage.deleted.lock().clear();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(world.storage.deleted.lock().is_empty(), "it is not asked a third time");
}

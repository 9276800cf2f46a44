// The K-extended main loop for sm_90a: [X | P]·[W ; V] without copying one next to the other.
//
//     k tile      0     1          main-1  main     total-1
//     A operand   X₀    X₁   …     X       P₀   …   P          [BLOCK_M, 64] each
//     B operand   W₀    W₁   …     W       V₀   …   V          [BLOCK_N, 64] each
//
// Only the producer warp knows that there are two sources: at k tile `main` it goes on with a
// second pair of TMA descriptors. Columns beyond K, and beyond R, are out of those descriptors'
// bounds, so the copy engine fills them with zeros and no consumer masks anything. Of the last
// tile the consumers multiply only the steps of 16 that hold columns of P. Launched by
// programmatic dependent launch, it waits for the kernel that makes P no earlier than there.
#pragma once

#include <cute/tensor.hpp>

#include "../host/kext_plan.h"

namespace nsru {

// BASE: cutlass::gemm::collective::CollectiveMma with TMA and wgmma, both operands from shared
// memory. Its pipeline, consumer and tensor shapes are taken as they are.
template <class BASE>
struct KextMainloop : BASE {
    using Operands = typename BASE::Arguments;
    struct Arguments {
        Operands main;  // X [M, k] and W
        Operands tail;  // P [M, r] and V
        int k;
        int r;
    };

    // The kernel is told K = BLOCK_K · total tiles; the descriptors hold the true bounds.
    struct Params : BASE::Params {
        typename BASE::Params tail;
        int main_tiles;
        int last_steps;
    };

    static_assert(cute::size<2>(typename BASE::TileShape{}) == kBlockK);
    static_assert(cute::size<2>(typename BASE::TiledMma::AtomShape_MNK{}) == kStepK);
    static_assert(BASE::K_PIPE_MMAS == 1,
                  "mma() leaves the last batch under way, as the base does");

    template <class PROBLEM>
    static Params to_underlying_arguments(const PROBLEM& problem, const Arguments& args,
                                          void* workspace) {
        const auto [m, n, k_extended, batches] = problem;
        return {BASE::to_underlying_arguments(cute::make_shape(m, n, args.k, batches), args.main,
                                              workspace),
                BASE::to_underlying_arguments(cute::make_shape(m, n, args.r, batches), args.tail,
                                              workspace),
                static_cast<int>(split_k(args.k, args.r).main), last_steps(args.r)};
    }

    // host/kext_plan.cpp refuses what TMA cannot describe. The base's rule is stricter: it wants R
    // to be a multiple of 8, where rows of P that start at 16 bytes are enough.
    template <class PROBLEM>
    static bool can_implement(const PROBLEM&, const Arguments&) {
        return true;
    }

    CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
        BASE::prefetch_tma_descriptors(params);
        BASE::prefetch_tma_descriptors(params.tail);
    }

    template <class INPUTS, class K_ITERATOR, class COORD>
    CUTLASS_DEVICE void load(const Params& params, typename BASE::MainloopPipeline pipeline,
                             typename BASE::PipelineState state, const INPUTS& inputs,
                             const COORD& tile_coord, K_ITERATOR k_tile, int k_tiles,
                             int thread_index, uint32_t rank_in_cluster,
                             typename BASE::TensorStorage& tensors_smem) {
        const int first = *k_tile;
        const int main = main_share(first, k_tiles, params.main_tiles);
        BASE::load(params, pipeline, state, inputs, tile_coord, k_tile, main, thread_index,
                   rank_in_cluster, tensors_smem);
        state.advance(main);
        // P may come from a kernel that still runs; X and W do not. The epilogue stores only after
        // it has had the tail, hence after that kernel, whose workspace `out` may take over.
        asm volatile("griddepcontrol.wait;" ::: "memory");
        // Coordinates of both sources are tiles of one grid, so `inputs` serves the tail as well.
        const auto tail_tile = cute::make_coord_iterator(first + main - params.main_tiles,
                                                         cute::shape<3>(cute::get<0>(inputs)));
        BASE::load(params.tail, pipeline, state, inputs, tile_coord, tail_tile, k_tiles - main,
                   thread_index, rank_in_cluster, tensors_smem);
    }

    // There are two tiles at least, one of X and one of P.
    template <class ACCUMULATOR>
    CUTLASS_DEVICE void mma(typename BASE::MainloopPipeline pipeline,
                            typename BASE::PipelineState state, ACCUMULATOR& acc, int k_tiles,
                            int thread_index, typename BASE::TensorStorage& tensors_smem,
                            const Params& params) {
        using namespace cute;
        BASE::mma(pipeline, state, acc, k_tiles - 1, thread_index, tensors_smem, params);

        auto release = state;
        release.advance(k_tiles - 2);
        state.advance(k_tiles - 1);
        typename BASE::TiledMma tiled_mma;
        tiled_mma.accumulate_ = GMMA::ScaleOut::One;
        constexpr int kThreads = cutlass::NumThreadsPerWarpGroup;
        const int warpgroup = __shfl_sync(0xFFFFFFFF, thread_index / kThreads, 0);
        const auto mine = tiled_mma.get_slice(warpgroup * kThreads);
        const auto a = mine.make_fragment_A(mine.partition_A(
            make_tensor(make_smem_ptr(tensors_smem.smem_A.data()), typename BASE::SmemLayoutA{})));
        const auto b = mine.make_fragment_B(mine.partition_B(
            make_tensor(make_smem_ptr(tensors_smem.smem_B.data()), typename BASE::SmemLayoutB{})));
        pipeline.consumer_wait(state);
        warpgroup_fence_operand(acc);
        // A batch each: one across branches costs the compiler an empty wgmma that commits it.
        CUTLASS_PRAGMA_UNROLL
        for (int step = 0; step < kBlockK / kStepK; ++step) {
            if (step < params.last_steps) {
                warpgroup_arrive();
                cute::gemm(tiled_mma, a(_, _, step, state.index()), b(_, _, step, state.index()),
                           acc);
                warpgroup_commit_batch();
            }
        }
        warpgroup_wait<1>();
        warpgroup_fence_operand(acc);
        pipeline.consumer_release(release);
    }
};

}  // namespace nsru

// One kernel of the K-extended GEMM: CUTLASS's persistent warp-specialised kernel with our main
// loop, and its launch. Included by one translation unit for each dtype and layout.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>

#include <algorithm>
#include <cutlass/cluster_launch.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <stdexcept>
#include <string>
#include <utility>

#include "../host/kext_plan.h"
#include "../launch.h"
#include "kext_instances.h"
#include "kext_mainloop.cuh"

namespace nsru {

template <class ELEMENT, KextLayout LAYOUT, size_t CONFIG>
struct KextGemm {
    static constexpr KextConfig kConfig = kConfigs[CONFIG];
    static constexpr bool kPingpong = kConfig.pingpong;
    using Tile =
        cute::Shape<cute::Int<kConfig.block_m>, cute::Int<kConfig.block_n>, cute::Int<kBlockK>>;
    using Cluster = cute::Shape<cute::Int<kClusterM>, cute::_1, cute::_1>;
    using Schedule = cute::conditional_t<kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                         cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
    using EpilogueSchedule = cute::conditional_t<kPingpong, cutlass::epilogue::TmaWarpSpecialized,
                                                 cutlass::epilogue::TmaWarpSpecializedCooperative>;
    using Rows = cutlass::layout::RowMajor;
    // CUTLASS names the layout of B as if it were [K, N].
    using LayoutB = cute::conditional_t<LAYOUT == KextLayout::kNK, cutlass::layout::ColumnMajor,
                                        cutlass::layout::RowMajor>;
    static constexpr int kAligned = kAlignment / sizeof(ELEMENT);

    // bias[n] + accumulator, rounded once. A null bias counts as zeros.
    using Bias = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, ELEMENT, float>;
    using Sum = cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, ELEMENT, float,
                                                       cutlass::FloatRoundStyle::round_to_nearest>;
    using Fusion =
        cutlass::epilogue::fusion::Sm90EVT<Sum, Bias, cutlass::epilogue::fusion::Sm90AccFetch>;

    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Rows, kAligned,
        ELEMENT, Rows, kAligned, EpilogueSchedule, Fusion>::CollectiveOp;
    using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename Epilogue::SharedStorage))>;
    using Mainloop = KextMainloop<typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, ELEMENT, Rows, kAligned, ELEMENT,
        LayoutB, kAligned, float, Tile, Cluster, Stages, Schedule>::CollectiveOp>;
    using Kernel =
        cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue,
                                             cutlass::gemm::PersistentScheduler>;

    static typename Mainloop::Operands operands(const void* a_gmem, int64_t lda, const void* b_gmem,
                                                int64_t ldb) {
        typename Kernel::StrideA stride_a{};
        typename Kernel::StrideB stride_b{};
        cute::get<0>(stride_a) = lda;
        cute::get<static_cast<int>(LAYOUT)>(stride_b) = ldb;
        return {static_cast<const ELEMENT*>(a_gmem), stride_a, static_cast<const ELEMENT*>(b_gmem),
                stride_b};
    }

    static typename Kernel::Arguments arguments(const KextGemmArgs& args, int device,
                                                int multiprocessors) {
        const KTiles tiles = split_k(args.k, args.r);
        typename Kernel::Arguments out{};
        out.mode = cutlass::gemm::GemmUniversalMode::kGemm;
        out.problem_shape = {static_cast<int>(args.m), static_cast<int>(args.n),
                             static_cast<int>(tiles.total() * kBlockK), 1};
        out.mainloop = {operands(args.x_gmem, args.ldx, args.w_gmem, args.ldw),
                        operands(args.p_gmem, args.ldp, args.v_gmem, args.ldv),
                        static_cast<int>(args.k), static_cast<int>(args.r)};
        out.epilogue.thread = {{static_cast<const ELEMENT*>(args.bias_gmem)}, {}, {}};
        out.epilogue.ptr_D = static_cast<ELEMENT*>(args.out_gmem);
        cute::get<0>(out.epilogue.dD) = args.ldo;
        out.hw_info.device_id = device;
        out.hw_info.sm_count = multiprocessors;
        out.scheduler.max_swizzle_size = args.swizzle;
        return out;
    }

    static void launch(const KextGemmArgs& args, const Place& place, int multiprocessors) {
        const auto kernel_arguments = arguments(args, place.device, multiprocessors);
        const auto stream = static_cast<cudaStream_t>(place.stream);
        if (!Kernel::can_implement(kernel_arguments)) {
            throw std::invalid_argument("CUTLASS refuses " + describe(args));
        }
        unsigned char* const memory =
            workspace(place, Kernel::get_workspace_size(kernel_arguments));
        const cutlass::Status status =
            Kernel::initialize_workspace(kernel_arguments, memory, stream);
        if (status != cutlass::Status::kSuccess) {
            throw std::runtime_error(std::string("workspace: ") +
                                     cutlass::cutlassGetStatusString(status));
        }
        const auto params = Kernel::to_underlying_arguments(kernel_arguments, memory);
        check_descriptors(params.mainloop, args);

        auto* const kernel = &cutlass::device_kernel<Kernel>;
        check("cudaFuncSetAttribute(MaxDynamicSharedMemorySize)",
              cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   Kernel::SharedStorageSize));
        cudaLaunchAttribute attributes[2] = {};
        attributes[0].id = cudaLaunchAttributeClusterDimension;
        attributes[0].val.clusterDim.x = kClusterM;
        attributes[0].val.clusterDim.y = 1;
        attributes[0].val.clusterDim.z = 1;
        attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[1].val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = Kernel::get_grid_shape(params);
        config.blockDim = Kernel::get_block_shape();
        config.dynamicSmemBytes = Kernel::SharedStorageSize;
        config.stream = stream;
        config.attrs = attributes;
        config.numAttrs = args.after_narrow ? 2 : 1;
        check("cudaLaunchKernelEx(kext_gemm)", cudaLaunchKernelEx(&config, kernel, params));
    }

    // CUTLASS only prints when the driver refuses a descriptor, and leaves it zeroed.
    static void check_descriptors(const typename Mainloop::Params& params,
                                  const KextGemmArgs& args) {
        const auto encoded = [](const auto& tma) {
            const auto* bytes = reinterpret_cast<const unsigned char*>(tma.get_tma_descriptor());
            return std::any_of(bytes, bytes + sizeof(CUtensorMap), [](auto b) { return b != 0; });
        };
        if (!encoded(params.tma_load_a) || !encoded(params.tma_load_b) ||
            !encoded(params.tail.tma_load_a) || !encoded(params.tail.tma_load_b)) {
            throw std::runtime_error("cuTensorMapEncodeTiled refuses " + describe(args));
        }
    }

    static constexpr KextEntry entry() {
        return {Mainloop::DispatchPolicy::Stages, static_cast<int>(Kernel::MaxThreadsPerBlock),
                static_cast<int>(Kernel::SharedStorageSize), launch};
    }
};

template <class ELEMENT, KextLayout LAYOUT, size_t... CONFIGS>
constexpr KextEntries kext_entries(std::index_sequence<CONFIGS...>) {
    return {KextGemm<ELEMENT, LAYOUT, CONFIGS>::entry()...};
}

template <class ELEMENT, KextLayout LAYOUT>
constexpr KextEntries kext_entries() {
    return kext_entries<ELEMENT, LAYOUT>(std::make_index_sequence<kConfigs.size()>{});
}

}  // namespace nsru
